"""Fill-in-the-middle on the boundaries of the syntax tree (arXiv 2207.14255, 2506.00204)."""

import random
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from ..data.code import Pieces, decode, split_at_nodes
from ..errors import LLMBuilderError
from ..models import context_length
from .base import Example, Run
from .tokens import Adapted, extend_vocabulary

SHARE = 0.5
# What stands before prefix, suffix and middle in models that know fill-in-the-middle; the first is added to others.
SENTINELS = (
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),
    ("▁<PRE>", "▁<SUF>", "▁<MID>"),
    ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"),
)


class FillInTheMiddle:
    """Turns half of the training examples, chosen by the seed, into prefix, suffix and then the middle between them.

    The middle is a node of the syntax tree or a run of siblings. The three pieces are tokenised by themselves, each
    behind its sentinel, and all of it is learnt, with an end of text behind it. What gets longer than an example may be
    loses the far ends of prefix and suffix. Not chosen are examples that are not learnt whole (they have a prompt),
    those whose pieces the tokenizer does not give back, and those that no node could be cut out of.

    Args:
        language: of the code.
        max_length: of an example, in tokens.
        adapted: the method that trains adapters; None where all weights train.

    Raises:
        LLMBuilderError: the model has no tokenizer, or no example could be turned.
    """

    name = "fill in the middle"

    def __init__(self, language: str, max_length: int, adapted: Adapted | None) -> None:
        self.language = language
        self.max_length = max_length
        self.adapted = adapted

    def extend(self, model: nn.Module) -> None:
        tokenizer: Any = getattr(model, "tokenizer", None)
        if tokenizer is None:
            raise LLMBuilderError("syntax_aware_training reads the text of tokens, and the model has no tokenizer")
        self.sentinels = known_sentinels(tokenizer) or SENTINELS[0]
        extend_vocabulary(model, self.sentinels, self.adapted)

    def prepare(self, run: Run) -> None:
        examples, limit = run.sources["train"], min(self.max_length, context_length(run.model) or self.max_length)
        turned: dict[int, Example] = {}
        draw = random.Random(f"{run.seed}/fill in the middle")
        for index in draw.sample(range(len(examples)), len(examples)):
            if len(turned) >= SHARE * len(examples):
                break
            example = self._turned(run.model, examples[index], limit, draw)
            if example is not None:
                turned[index] = example
        if not turned:
            raise LLMBuilderError(
                f"syntax_aware_training found no syntax to cut at in {len(examples)} examples: give plain code in "
                f"{self.language}, or another code_language"
            )
        run.sources["train"] = Turned(examples, turned)

    def _turned(self, model: Any, example: Example, limit: int, draw: random.Random) -> Example | None:
        ids = list(example["input_ids"])
        text = decode(model.tokenizer, ids)
        if list(example["labels"]) != ids or "\ufffd" in text:
            return None
        pieces = split_at_nodes(text, self.language, draw)
        return None if pieces is None else fill_in(model.tokenizer, pieces, self.sentinels, limit)


def fill_in(tokenizer: Any, pieces: Pieces, sentinels: Sequence[str], limit: int) -> Example | None:
    """An example that gives prefix and suffix and then says the middle; None where these pieces make none."""
    prefix, middle, suffix = (list(tokenizer(piece, add_special_tokens=False)["input_ids"]) for piece in pieces)
    if any(decode(tokenizer, ids) != piece for ids, piece in zip((prefix, middle, suffix), pieces, strict=True)):
        return None
    before, between, behind = tokenizer.convert_tokens_to_ids(list(sentinels))
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    room = limit - len(middle) - 3 - len(end)
    if room < 2:
        return None
    kept = min(len(suffix), max(room - len(prefix), room // 2))
    prefix, suffix = prefix[max(0, len(prefix) - (room - kept)) :], suffix[:kept]
    ids = [before, *prefix, between, *suffix, behind, *middle, *end]
    return {"input_ids": ids, "labels": list(ids)}


def known_sentinels(tokenizer: Any) -> tuple[str, ...] | None:
    """Those that the tokenizer has; None where it has no set of three."""
    known = tokenizer.get_vocab()
    return next((names for names in SENTINELS if all(name in known for name in names)), None)


class Turned(Sequence[Example]):
    """Examples, some of which are replaced."""

    def __init__(self, examples: Sequence[Example], turned: Mapping[int, Example]) -> None:
        self._examples, self.turned = examples, turned

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        return self.turned[index] if index in self.turned else self._examples[index]
