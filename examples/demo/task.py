"""A two-way verdict on sentences: what a demo model is asked, how its answers are scored, and how runs are split."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from llmbuilder.data import Example, TaskDataset, collate
from llmbuilder.finetune import FineTuningConfig
from llmbuilder.models import chat_prompt, generate
from llmbuilder.nn.heads import LanguageHead
from llmbuilder.ops import linear_cross_entropy

KIND = "conversation"


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

    def config(self, **more: Any) -> FineTuningConfig:
        return FineTuningConfig(**self.settings, **more, task_type=KIND, use_lora=True, seed=0)

    def dataset(self, sentences: list[Sentence]) -> TaskDataset:
        return TaskDataset([{"messages": self.messages(s.text, s.label)} for s in sentences], KIND)

    def examples(self, sentences: list[Sentence]) -> list[Example]:
        """Tokenised as in training, labels at the answer alone."""
        dataset = self.dataset(sentences)
        dataset.bind(self.model.tokenizer, self.config())
        assert len(dataset) == len(sentences), dataset.report
        return [dataset[i] for i in range(len(dataset))]


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
    sentences = sorted(sentences, key=lambda s: len(s.text))  # batches of like lengths
    examples, first = task.examples(sentences), first_tokens(task)
    head, output = LanguageHead(task.model), task.model.get_output_embeddings()
    # in fp32, for in bf16 the two logits often tie
    direction = (output.weight[first[0]].float() - output.weight[first[1]].float()).detach()
    differences, losses, tokens = [], 0.0, 0
    for start in range(0, len(sentences), batch_size):
        batch = collate(examples[start : start + batch_size], "default")
        with torch.no_grad():
            states, targets = head.target_states(batch)
            losses += linear_cross_entropy(states, output.weight, targets, reduction="sum").item()
        tokens += len(targets)
        answers_end = (batch["labels"] != -100).sum(1).cumsum(0)  # among all targets of the batch, row after row
        starts = torch.cat([answers_end.new_zeros(1), answers_end[:-1]])
        differences += (states[starts].float() @ direction).tolist()
    labels, d = np.array([s.label for s in sentences]), np.array(differences)
    return Scores(float(((d > 0) == (labels == 1)).mean()), auc(d, labels), float(np.exp(losses / tokens)))


def first_tokens(task: Task) -> list[int]:
    """The first token of each of the two answers, as the task's examples spell it."""
    examples = task.examples([Sentence("x", 1), Sentence("x", 0)])
    return [next(token for token in example["labels"] if token != -100) for example in examples]


def auc(scores: np.ndarray, labels: np.ndarray) -> float:
    """Probability that a sentence of label 1 scores above one of label 0, ties counted half (Mann and Whitney 1947)."""
    ones, zeros = scores[labels == 1], scores[labels == 0]
    above = (ones[:, None] > zeros[None, :]).mean() + 0.5 * (ones[:, None] == zeros[None, :]).mean()
    return float(above)


def answers(task: Task, prompts: list[list[dict[str, str]]], limit: int) -> list[str]:
    tokenizer = task.model.tokenizer
    ids = generate(task.model, [chat_prompt(tokenizer, p) for p in prompts], limit, stop_ids=(tokenizer.eos_token_id,))
    return [" ".join(tokenizer.decode(i, skip_special_tokens=True).split()) for i in ids]
