"""Elastic weight consolidation: weights that the past depends on move less (arXiv 1612.00796).

    loss + λ/2 · Σ_t Σ_i F_ti (θ_i - θ*_ti)²

over past tasks t: θ* is where a task left the weights, F its Fisher information per token (``fisher.py``).

A sum of squares is one square and a constant, so that any number of tasks is held as three things:

    F̄ = Σ F_t     θ̄ = Σ F_t θ*_t / F̄     c = Σ_t F_t (θ*_t - θ̄)², summed over all weights
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..nn.heads import IGNORED
from ..nn.tasks import heads_aside
from ..ops import ewc_penalty_
from .base import Example, Run
from .fisher import Tensors, diagonal_fisher, language_scores

TOKENS = 16384
"""Targets that a task's Fisher information is estimated from, where the task has so many."""
BATCH_LOGITS, BATCH_TOKENS = 2**24, 2048
"""Most logits of a batch of them (64 MiB in fp32), and most tokens: with long examples more at once are slower."""
PROBE = (16, 12)
"""Tokens of the two examples that the batched way is tried on."""


@dataclass
class Quadratic:
    """``Σ F (θ - θ*)² + c``: what the past holds against moving the weights, by their names.

    ``fishers`` and ``anchors`` are tensors like the weights, contiguous; ``constant`` is c.
    """

    fishers: dict[str, Tensor] = field(default_factory=dict)
    anchors: dict[str, Tensor] = field(default_factory=dict)
    constant: float = 0.0

    @torch.no_grad()
    def fold(self, fishers: Tensors, anchors: Tensors) -> None:
        """Add ``Σ F (θ - θ*)²`` of one more task, exactly: as two functions of θ the sums are equal. In fp64, rounded
        to the tensors' dtype at the end. Weights that this task does not know keep what they have."""
        for name, fisher in fishers.items():
            added, anchor = fisher.double(), anchors[name].detach().double()
            if name in self.fishers:
                known, before = self.fishers[name].double(), self.anchors[name].double()
                total = known + added
                share = torch.where(total > 0, added / total, 1.0)
                self.constant += float((known * share * (anchor - before) ** 2).sum())
                added, anchor = total, torch.lerp(before, anchor, share)
            # copies, also where nothing is rounded: an anchor must not move with the weight
            self.fishers[name] = added.to(fisher.dtype, copy=True).contiguous()
            self.anchors[name] = anchor.to(anchors[name].dtype, copy=True).contiguous()

    def replace(self, fishers: Tensors, anchors: Tensors, decay: float) -> None:
        """``F = decay · F + F_new`` around the newest anchors (online EWC, arXiv 1805.06370, equation 9)."""
        for name, fisher in fishers.items():
            known = self.fishers.get(name)
            self.fishers[name] = fisher.clone() if known is None else known * decay + fisher
            self.anchors[name] = anchors[name].detach().clone(memory_format=torch.contiguous_format)

    def add_penalty_(self, params: dict[str, nn.Parameter], strength: float) -> float:
        """Add the gradient of ``strength/2 · (ΣF(θ - θ*)² + c)`` to each ``.grad``, by the fused kernel; the value.

        Weights that do not train for now get no gradient, and do not count.
        """
        names = [name for name, weight in params.items() if name in self.fishers and weight.requires_grad]
        value = ewc_penalty_(
            [params[name] for name in names],
            [self.anchors[name] for name in names],
            [self.fishers[name] for name in names],
            strength,
        )
        return float(value) + strength / 2 * self.constant


class EWC:
    """Holds the weights that train where the past left them, each as strongly as the past depends on it.

    What past there is: before the first task the base model, by its Fisher information on ``run.general`` (without
    which it has none); after each task the task, by that on its training data. With adapters, the weights are A and B.

    Args:
        strength: λ. With 1 a token of the past counts as one of the present.
        empirical: the Fisher information of the data's labels, not of labels that the model draws.
        decay: online EWC: one anchor, the newest, and the past's Fisher information fades by this factor a task, in
            [0, 1]. None: every task counts in full, around its own anchor.
        estimate: how the Fisher information of weights on some examples is found, for models other than of language.

    Raises:
        ConfigError: a run that goes on trains none of the weights that the past knows, or another model's.
    """

    name = "ewc"

    def __init__(
        self, strength: float, empirical: bool = False, decay: float | None = None, estimate: "Estimate | None" = None
    ) -> None:
        self.strength, self.empirical, self.decay = strength, empirical, decay
        self._estimate = estimate or fisher_of
        self.past_tasks = Quadratic()
        self._params: dict[str, nn.Parameter] = {}

    def prepare(self, run: Run) -> None:
        with heads_aside(run.model):  # heads of other tasks change the name of the model's own
            self._params = {name: weight for name, weight in run.model.named_parameters() if weight.requires_grad}
        self._place()
        if self.past_tasks.fishers and not self.past_tasks.fishers.keys() & self._params.keys():
            raise ConfigError("the earlier run knows nothing of the weights that this one trains: train the same")

    def before_task(self, run: Run) -> None:
        if not self.past_tasks.fishers and run.general is not None:
            self.add_task(self._estimate(run, self._params, run.general, self.empirical))

    def penalty(self) -> float:
        return self.past_tasks.add_penalty_(self._params, self.strength)

    def after_task(self, run: Run) -> None:
        self.add_task(self._estimate(run, self._params, run.sources["train"], self.empirical))

    def add_task(self, fishers: Tensors) -> None:
        """Count a task as past, whose Fisher information this is at the weights as they are."""
        if self.decay is None:
            self.past_tasks.fold(fishers, self._params)
        else:
            self.past_tasks.replace(fishers, self._params, self.decay)

    def state(self) -> dict[str, Any]:
        kept = self.past_tasks
        return (
            {"constant": kept.constant}
            | {f"fisher/{name}": value for name, value in kept.fishers.items()}
            | {f"anchor/{name}": value for name, value in kept.anchors.items()}
        )

    def load_state(self, state: dict[str, Any]) -> None:
        def part(kind: str) -> dict[str, Tensor]:
            return {key.removeprefix(kind): value for key, value in state.items() if key.startswith(kind)}

        self.past_tasks = Quadratic(part("fisher/"), part("anchor/"), state["constant"])
        self._place()

    past, load_past = state, load_state

    def _place(self) -> None:
        """Bring what was loaded to where the weights are. The past does not hold the rows that a table got since."""
        fishers, anchors = self.past_tasks.fishers, self.past_tasks.anchors
        for name in fishers.keys() & self._params.keys():
            weight = self._params[name].detach()
            fisher, anchor = (kept[name].to(weight.device) for kept in (fishers, anchors))
            if fisher.shape[1:] != weight.shape[1:] or len(fisher) > len(weight):
                raise ConfigError(
                    f"the earlier run knows '{name}' as {[*fisher.shape]}, and the model has it as {[*weight.shape]}: "
                    "go on with the model that it left"
                )
            if len(fisher) < len(weight):
                new = weight[len(fisher) :].to(anchor.dtype)
                fisher, anchor = torch.cat([fisher, torch.zeros_like(new)]), torch.cat([anchor, new])
            fishers[name], anchors[name] = fisher, anchor


Estimate = Callable[[Run, dict[str, nn.Parameter], Sequence[Example], bool], dict[str, Tensor]]


def fisher_of(
    run: Run, params: dict[str, nn.Parameter], examples: Sequence[Example], empirical: bool
) -> dict[str, Tensor]:
    """The Fisher information of ``params`` on examples of language, as many as make up ``TOKENS`` targets."""
    model: Any = run.model
    chosen = _chosen(examples, run.seed)
    vocabulary = int(model.get_input_embeddings().weight.shape[0])
    batches = (run.tensors(part) for part in batches_of(chosen, run.batch_size, vocabulary))
    with run.autocast():
        return diagonal_fisher(
            model,
            params,
            batches,
            language_scores(model),
            empirical=empirical,
            seed=run.seed,
            head=model.get_output_embeddings(),
            probe=run.tensors(beginnings(chosen)) if chosen else None,
        )


def _chosen(examples: Sequence[Example], seed: int) -> list[dict[str, list[int]]]:
    """Examples drawn at random, each once, until they have ``TOKENS`` targets; the longest first."""
    order = list(range(len(examples)))
    random.Random(f"{seed}/fisher").shuffle(order)
    chosen, targets = [], 0
    for index in order:
        if targets >= TOKENS:
            break
        example = {name: examples[index][name] for name in ("input_ids", "labels")}
        targets += sum(label != IGNORED for label in example["labels"][1:])
        chosen.append(example)
    return sorted(chosen, key=lambda example: -len(example["input_ids"]))


def beginnings(examples: Sequence[dict[str, list[int]]]) -> list[dict[str, list[int]]]:
    """Short examples of unlike length, with a target at every token."""
    cut = [example["input_ids"][:length] for example, length in zip(examples, PROBE, strict=False)]
    return [{"input_ids": ids, "labels": ids} for ids in cut]


def batches_of(
    examples: Sequence[dict[str, list[int]]], most_rows: int, vocabulary: int
) -> Iterator[list[dict[str, list[int]]]]:
    """In their order; at most so many rows and, in more than one row, no more tokens with padding than are good."""
    most_tokens = min(BATCH_TOKENS, BATCH_LOGITS // vocabulary)
    start = 0
    while start < len(examples):
        rows = max(1, min(most_rows, most_tokens // len(examples[start]["input_ids"])))
        yield list(examples[start : start + rows])
        start += rows
