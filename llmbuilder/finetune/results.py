"""What a run and an evaluation return."""

import dataclasses
import math
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any


@dataclass(frozen=True)
class EvalResults:
    """How well a model does on a data set.

    Attributes:
        loss: cross-entropy in nats a target token, every token of the data set weighing the same.
        perplexity: ``exp(loss)``.
        bleu_score: corpus BLEU (sacrebleu, 0 to 100) of greedy continuations; NaN where there is nothing to compare.
        task_accuracy: in [0, 1]: exact match of generated answers for question answering (NaN without any), the share
            of targets that are the most likely token otherwise.
        tokens: targets that ``loss`` is the mean of.
        generations: (continuation, reference) pairs, the very strings that were compared.
    """

    loss: float
    perplexity: float
    bleu_score: float
    task_accuracy: float
    tokens: int
    generations: list[tuple[str, str]] = field(default_factory=list, repr=False)


@dataclass(frozen=True)
class Results:
    """What a training run did.

    Attributes:
        base_perplexity, final_perplexity: before the first step, and of the weights that are kept at the end.
        improvement_percentage: ``100 * (base - final) / base``.
        training_time: spent in training and the evaluations in between, over all parts of a resumed run.
        evaluated_on: the data of both perplexities: "validation", "held out" (by ``validation_split``) or "training".
        steps: optimizer steps done.
        best_step: whose weights are kept; the last one, unless early stopping restored better ones.
        history: metrics.jsonl as a list.
        forgetting: with ``validation_on_base_tasks``, how much the loss on the base tasks has risen, in nats a token.
        domain: what the domain is called, where one is named.
    """

    base_perplexity: float
    final_perplexity: float
    improvement_percentage: float
    training_time: timedelta
    evaluated_on: str
    steps: int
    best_step: int
    history: list[dict[str, Any]] = field(repr=False)
    forgetting: float | None = None
    domain: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain values as in results.json: without the history, the time in seconds."""
        values = {
            entry.name: getattr(self, entry.name) for entry in dataclasses.fields(self) if entry.name != "history"
        }
        return values | {"training_time": self.training_time.total_seconds()}

    @classmethod
    def from_dict(cls, values: dict[str, Any], history: list[dict[str, Any]]) -> "Results":
        """The results that ``to_dict`` turned into plain values."""
        names = {entry.name for entry in dataclasses.fields(cls)}
        known = {name: value for name, value in values.items() if name in names}
        return cls(**known | {"training_time": timedelta(seconds=values["training_time"]), "history": history})


def perplexity(loss: float) -> float:
    """``exp(loss)``; infinite where that is beyond a float."""
    try:
        return math.exp(loss)
    except OverflowError:
        return math.inf
