"""How good a model is on a data set: loss and accuracy over all of it, BLEU and exact match on what it generates."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..models import context_length, end_ids, generate
from ..nn.heads import LanguageHead

GENERATED_PAIRS = 64
MAX_NEW_TOKENS = 128


@dataclass(frozen=True)
class Score:
    """Sums over a data set: cross-entropy in nats, targets that are the most likely token, targets."""

    loss_sum: float
    correct: int
    tokens: int

    def __add__(self, other: "Score") -> "Score":
        return Score(self.loss_sum + other.loss_sum, self.correct + other.correct, self.tokens + other.tokens)

    @property
    def loss(self) -> float:
        return self.loss_sum / self.tokens if self.tokens else math.nan

    @property
    def accuracy(self) -> float:
        return self.correct / self.tokens if self.tokens else math.nan


def score(head: LanguageHead, batches: Iterable[Mapping[str, Tensor]]) -> Score:
    """Add up every batch's ``LanguageHead.score``; the sums are Python floats, thus fp64."""
    total = Score(0.0, 0, 0)
    for batch in batches:
        total = total + Score(*head.score(batch))
    return total


def continuations(
    model: nn.Module, tokenizer: Any, pairs: Sequence[tuple[list[int], str]], batch_size: int
) -> list[tuple[str, str]]:
    """Greedy continuations of prompts beside their references, as text with its outer white space removed.

    A continuation ends where the model's text ends, or one token after the reference would, so that an answer that
    goes on too long is seen to; a reference is compared up to its first 128 tokens. A pair that does not fit into the
    model's context is left out.
    """
    longest = context_length(model) or math.inf
    wanted = []
    for prompt, reference in pairs:
        target = tokenizer(reference, add_special_tokens=False)["input_ids"]
        room = min(len(target) + 1, MAX_NEW_TOKENS)
        if target and len(prompt) + room <= longest:
            wanted.append((prompt, target[:MAX_NEW_TOKENS], room))
    # Of one length, prompts need no padding, which would change the last bits of the logits.
    wanted.sort(key=lambda row: (len(row[0]), row[2]))
    compared = []
    for start in range(0, len(wanted), batch_size):
        rows = wanted[start : start + batch_size]
        room = max(row[2] for row in rows)
        outputs = generate(model, [prompt for prompt, _, _ in rows], room, temperature=0.0, stop_ids=end_ids(model))
        for (_, target, limit), output in zip(rows, outputs, strict=True):
            texts = [tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in (output[:limit], target)]
            compared.append((texts[0], texts[1]))
    return compared


def bleu(compared: Sequence[tuple[str, str]]) -> float:
    """sacrebleu's corpus BLEU, 0 to 100, with its default settings; NaN for no pairs."""
    if not compared:
        return math.nan
    import sacrebleu

    hypotheses, references = [pair[0] for pair in compared], [pair[1] for pair in compared]
    return float(sacrebleu.corpus_bleu(hypotheses, [references]).score)


def exact_match(compared: Sequence[tuple[str, str]]) -> float:
    """Share of continuations that equal their reference but for white space; NaN for no pairs."""
    if not compared:
        return math.nan
    return sum(said.split() == wanted.split() for said, wanted in compared) / len(compared)
