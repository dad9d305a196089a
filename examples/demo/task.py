"""A two-way verdict on sentences: what a demo model is asked, how its answers are scored, and how runs are split."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from llmbuilder.models import chat_prompt, generate
from llmbuilder.nn.heads import LanguageHead


@dataclass(frozen=True)
class Sentence:
    text: str
    label: int  # 1: the first word of Task.words is right, 0: the second


@dataclass
class Task:
    """Everything that differs between the real model and the tiny one."""

    model: Any
    instruction: str
    words: tuple[str, str]
    train: list[Sentence]
    held_out: dict[str, list[Sentence]]  # by domain; the first is the domain trained on, the others were never seen
    unrelated: list[str]  # prompts that have nothing to do with the task: forgetting would show here
    settings: dict[str, Any] = field(default_factory=dict)  # of FineTuningConfig
    source: str = ""

    def messages(self, text: str, label: int | None = None) -> list[dict[str, str]]:
        chat = [{"role": "user", "content": f"{self.instruction}\n\n{text}"}]
        if label is not None:
            chat.append({"role": "assistant", "content": self.words[1 - label]})
        return chat

    def rows(self, sentences: list[Sentence]) -> list[dict[str, Any]]:
        return [{"messages": self.messages(s.text, s.label)} for s in sentences]


def share(text: str) -> float:
    """A number in [0, 1) that depends on the text alone: splits stay the same however many sentences there are."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") / 2**64


def balanced(sentences: list[Sentence], count: int) -> list[Sentence]:
    """The first ``count`` sentences in the order of their hashes, half of each label."""
    ordered = sorted(sentences, key=lambda s: share("order:" + s.text))
    half = count // 2
    picked = [s for label in (0, 1) for s in [t for t in ordered if t.label == label][:half]]
    if len(picked) < count:
        raise SystemExit(f"only {len(picked)} of {count} sentences: is the data complete?")
    return sorted(picked, key=lambda s: share("order:" + s.text))


@dataclass(frozen=True)
class Scores:
    accuracy: float
    auc: float
    perplexity: float


def score(task: Task, sentences: list[Sentence], batch_size: int = 32) -> Scores:
    """Accuracy of the likelier word, area under the ROC curve of the difference of the two words' logits, and the
    perplexity of the right answer (its end token included)."""
    differences, losses, tokens = [], 0.0, 0
    head = LanguageHead(task.model)
    first = [task.model.tokenizer(word, add_special_tokens=False)["input_ids"][0] for word in task.words]
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i].text))
    for start in range(0, len(order), batch_size):
        chunk = [sentences[i] for i in order[start : start + batch_size]]
        batch, ends = padded(task, chunk)
        loss, _, count = head.score(batch)
        losses, tokens = losses + loss, tokens + count
        differences += word_difference(task.model, head, batch, ends, first)
    labels = np.array([sentences[i].label for i in order])
    d = np.array(differences)
    return Scores(float(((d > 0) == (labels == 1)).mean()), auc(d, labels), float(np.exp(losses / tokens)))


def padded(task: Task, sentences: list[Sentence]) -> tuple[dict[str, torch.Tensor], list[int]]:
    """Prompt and right answer of each sentence, padded on the right, and the index of each prompt's last token."""
    prompts = [chat_prompt(task.model.tokenizer, task.messages(s.text)) for s in sentences]
    stop = task.model.tokenizer.eos_token_id
    answers = [
        [*task.model.tokenizer(task.words[1 - s.label], add_special_tokens=False)["input_ids"], stop] for s in sentences
    ]
    width = max(len(p) + len(a) for p, a in zip(prompts, answers, strict=True))
    ids = torch.zeros(len(sentences), width, dtype=torch.long)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, (p, a) in enumerate(zip(prompts, answers, strict=True)):
        ids[i, : len(p) + len(a)] = torch.tensor(p + a)
        labels[i, len(p) : len(p) + len(a)] = torch.tensor(a)
        mask[i, : len(p) + len(a)] = 1
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}, [len(p) - 1 for p in prompts]


def word_difference(model, head: LanguageHead, batch, ends: list[int], first: list[int]) -> list[float]:
    """Logit of the first word less that of the second, in fp32: in bf16 the two often tie."""
    hidden = head.hidden_states(batch)[torch.arange(len(ends)), torch.tensor(ends)].float()
    output = model.get_output_embeddings()
    direction = (output.weight[first[0]].float() - output.weight[first[1]].float()).detach()
    bias = getattr(output, "bias", None)
    offset = 0.0 if bias is None else (bias[first[0]] - bias[first[1]]).item()
    return (hidden @ direction + offset).tolist()


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Probability that a sentence of label 1 scores above one of label 0, ties counted half (Mann and Whitney 1947)."""
    ones, zeros = scores[labels == 1], scores[labels == 0]
    above = (ones[:, None] > zeros[None, :]).mean() + 0.5 * (ones[:, None] == zeros[None, :]).mean()
    return float(above)


def answers(task: Task, prompts: list[list[dict[str, str]]], limit: int) -> list[str]:
    tokenizer = task.model.tokenizer
    ids = generate(task.model, [chat_prompt(tokenizer, p) for p in prompts], limit, stop_ids=(tokenizer.eos_token_id,))
    return [" ".join(tokenizer.decode(i, skip_special_tokens=True).split()) for i in ids]
