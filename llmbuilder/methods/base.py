"""What a fine-tuning method may do, and when.

A method is an object with a ``name`` and those hooks of :class:`Method` that it needs. The loop calls them here:

    load_past                   first of all, in a run that goes on from an earlier one
    extend                      before the data are tokenised: add tokens to the tokenizer
    prepare                     before the optimizer is made: change the model, choose what trains, add data sources
    load_state                  on resume, after prepare
    before_task                 once, before the first step: look at the model as the task finds it (not on resume)
    batches                     before each epoch: which examples form each batch
    start_epoch                 before each epoch: what trains from here on
    for each optimizer step:
        split                   once a batch: into parts that need the model set in different ways
        loss, extra_loss        once a part; together they make the step's loss
        penalty                 once a step, after the last backward and before clipping: adds to ``.grad`` itself
        after_step              once a step, after the optimizer
    state                       at each checkpoint
    after_task                  once, after the last step: look back
    past                        then: what a run that goes on from this one shall know
    results                     then: what the method found out about the run
    export                      writes what was trained

Several methods compose: each hook runs in the order in which the methods are given.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor, nn

from ..data import collate
from ..data.examples import IGNORED

Example = Mapping[str, list[int]]
Key = tuple[str, int]
"""Where an example comes from: the name of a source, and the index in it."""


@dataclass
class Batch:
    """What one forward pass sees: a collator's tensors, the examples that they were made of, and the target count."""

    tensors: dict[str, Tensor]
    keys: list[Key]
    targets: int

    def where(self, wanted: Callable[[Key], bool]) -> "Batch | None":
        """The rows of some keys as a batch of its own, no wider than it must be; None where there is none of them.

        Of a padded batch, whose rows are its examples (a packed one's are not).
        """
        rows = [row for row, key in enumerate(self.keys) if wanted(key)]
        if not rows:
            return None
        if len(rows) == len(self.keys):
            return self
        width = int(self.tensors["attention_mask"][rows].sum(1).max())
        tensors = {name: tensor[rows, :width] for name, tensor in self.tensors.items()}
        targets = int((tensors["labels"][:, 1:] != IGNORED).sum())
        return Batch(tensors, [self.keys[row] for row in rows], targets)


@dataclass
class Run:
    """What a method finds and may extend when it prepares.

    Attributes:
        model: the model, changed in place by methods.
        seed: of every random choice.
        sources: the data sets that batches draw from, by name. ``"train"`` is always there; the keys of
            ``Method.batches`` name the others.
        general: what the base model is for, as given (``general_dataset=``); ``methods/general.py`` makes some if None.
        base_val: the base tasks' validation data, as given (``base_val_dataset=``).
        continues: whether the model comes from an earlier run, with the adapter that trains.
        batch_size: examples in one forward pass.
        autocast: the context that the model's forward pass runs in.
        loss: cross-entropy a token over all of a data set, in evaluation mode; given by the tuner.
    """

    model: nn.Module
    seed: int = 0
    sources: dict[str, Sequence[Example]] = field(default_factory=dict)
    general: Sequence[Example] | None = None
    base_val: Sequence[Example] | None = None
    continues: bool = False
    batch_size: int = 8
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    loss: Callable[[Sequence[Example]], float] | None = None

    def tensors(self, examples: Sequence[Example]) -> dict[str, Tensor]:
        """A padded batch, a row for each example, where the model is."""
        device = next(self.model.parameters()).device
        return {name: tensor.to(device) for name, tensor in collate(examples).items()}


class Method(Protocol):
    """Every hook there is. A method defines those that it needs, and no others."""

    name: str
    """Names the method's state in a checkpoint; unlike that of any other method in the run."""

    def extend(self, model: nn.Module) -> None:
        """Give the model and its tokenizer the tokens that the data will need. Must do the same in a resumed run."""

    def prepare(self, run: Run) -> None:
        """Change the model and choose what trains (``requires_grad``); a frozen weight stays as it is, bit for bit.

        Whatever may train in any epoch must require a gradient when all methods have prepared; ``start_epoch`` can
        take it away for a while. Must do the same, given the same model and seed, in a resumed run.
        """

    def batches(self, epoch: int, plan: Iterable[list[Key]]) -> Iterable[list[Key]]:
        """The keys of each batch of an epoch, made from ``plan``, those of the methods before.

        Must depend on nothing but the arguments, the seed and what ``load_state`` restores, and have the same length
        in every epoch: a resumed run asks for the plan again and goes on where it was.
        """

    def start_epoch(self, epoch: int) -> None:
        """Set ``requires_grad`` for this epoch. A parameter without a gradient is neither moved nor decayed, and its
        optimizer state starts clean when it first has one."""

    def split(self, batch: Batch) -> Iterator[Batch]:
        """The batch in parts, the model set for each until the next one is asked for: forward and backward pass of a
        part run in between. At most one method of a run may define it."""

    def parts(self, dataset: Any) -> Iterator[Any]:
        """A data set to judge by in parts, the model set for each likewise. Goes with ``split``."""

    def loss(self, model: nn.Module, batch: Batch, window: Sequence[Batch]) -> Tensor:
        """This part's share of the step's loss, in place of cross-entropy over the step's targets.

        ``window`` holds all batches of the optimizer step, so that whatever is averaged can be counted first. At most
        one method of a run may define it.
        """

    def extra_loss(self, model: nn.Module, batch: Batch, window: Sequence[Batch]) -> Tensor | None:
        """This batch's share of a term that is added to the step's loss; None where it has none."""

    def penalty(self) -> float:
        """Add a penalty's gradient to ``.grad``, once a step, before clipping; returns the penalty's value."""

    def after_step(self, step: int) -> None:
        """``step`` optimizer steps are done, this one included."""

    def before_task(self, run: Run) -> None:
        """The model is as the task finds it, on its device, in evaluation mode, adapters in place; not on resume."""

    def after_task(self, run: Run) -> None:
        """The last step is done and the best weights, where kept, are in place: look back on the task."""

    def past(self) -> dict[str, Any]:
        """What a run that goes on from this one shall know, in the form of ``state``."""

    def load_past(self, past: dict[str, Any]) -> None:
        """Take what ``past`` returned in the earlier run; ``prepare`` comes after it."""

    def results(self) -> dict[str, Any]:
        """Fields of ``finetune.Results`` that this method fills."""

    def state(self) -> dict[str, Any]:
        """What a resumed run needs, beyond the trained parameters: tensors, or values that JSON can hold, by name."""

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back what ``state`` returned."""

    def export(self, model: nn.Module, folder: Path) -> None:
        """Write what the method trained into a run's folder, whole or not at all, each under a name of its own."""


class Methods:
    """Several methods as one: each hook goes to those that define it, in order."""

    def __init__(self, methods: Sequence[Any]) -> None:
        self._methods = list(methods)

    def _hooks(self, name: str) -> list[Callable[..., Any]]:
        return [getattr(method, name) for method in self._methods if hasattr(method, name)]

    def extend(self, model: nn.Module) -> None:
        for hook in self._hooks("extend"):
            hook(model)

    def prepare(self, run: Run) -> None:
        for hook in self._hooks("prepare"):
            hook(run)

    def batches(self, epoch: int, plan: Iterable[list[Key]]) -> list[list[Key]]:
        for hook in self._hooks("batches"):
            plan = hook(epoch, plan)
        return list(plan)

    def start_epoch(self, epoch: int) -> None:
        for hook in self._hooks("start_epoch"):
            hook(epoch)

    def split(self, batch: Batch) -> Iterator[Batch]:
        """The batch in the parts of the method that splits it, else as it is."""
        for hook in self._hooks("split"):
            return iter(hook(batch))
        return iter([batch])

    def parts(self, dataset: Any) -> Iterator[Any]:
        """A data set to judge by, in the parts of the method that splits it, else as it is."""
        for hook in self._hooks("parts"):
            return iter(hook(dataset))
        return iter([dataset])

    def loss(self, model: nn.Module, batch: Batch, window: Sequence[Batch]) -> Tensor | None:
        """The loss of the method that defines one, else None."""
        for hook in self._hooks("loss"):
            return hook(model, batch, window)
        return None

    def extra_loss(self, model: nn.Module, batch: Batch, window: Sequence[Batch]) -> Tensor | None:
        """The sum of all extra losses, or None where there is none."""
        terms = [hook(model, batch, window) for hook in self._hooks("extra_loss")]
        given = [term for term in terms if term is not None]
        return sum(given[1:], start=given[0]) if given else None

    def penalty(self) -> float:
        return sum(hook() for hook in self._hooks("penalty"))

    def add_losses(self) -> bool:
        """Whether any method adds a term to the loss."""
        return bool(self._hooks("extra_loss") or self._hooks("penalty"))

    def after_step(self, step: int) -> None:
        for hook in self._hooks("after_step"):
            hook(step)

    def before_task(self, run: Run) -> None:
        for hook in self._hooks("before_task"):
            hook(run)

    def after_task(self, run: Run) -> None:
        for hook in self._hooks("after_task"):
            hook(run)

    def past(self) -> dict[str, dict[str, Any]]:
        return {method.name: method.past() for method in self._methods if hasattr(method, "past")}

    def load_past(self, pasts: dict[str, dict[str, Any]]) -> None:
        """Methods that the earlier run did not have start anew."""
        for method in self._methods:
            if hasattr(method, "load_past") and method.name in pasts:
                method.load_past(pasts[method.name])

    def results(self) -> dict[str, Any]:
        return {name: value for hook in self._hooks("results") for name, value in hook().items()}

    def state(self) -> dict[str, dict[str, Any]]:
        return {method.name: method.state() for method in self._methods if hasattr(method, "state")}

    def load_state(self, states: dict[str, dict[str, Any]]) -> None:
        for method in self._methods:
            if hasattr(method, "load_state"):
                method.load_state(states.get(method.name, {}))

    def export(self, model: nn.Module, folder: Path) -> None:
        for hook in self._hooks("export"):
            hook(model, folder)
