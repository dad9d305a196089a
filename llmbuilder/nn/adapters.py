"""Several adapters on one model: which take part and how much, combining them, deleting one, switching all off."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..errors import LLMBuilderError
from .config import LoRAConfig
from .inject import Plan, attach, set_active
from .lora import Piece, TrainedCopy, Update
from .state import AdapterState, check_known, check_unmerged
from .tokens import TrainedRows
from .tree import Wrapper, find_state, named_wrappers, shares_of, state_of, unwrap, wrappers


def active_adapters(model: nn.Module) -> dict[str, float]:
    """The adapters that take part, with their weights; empty for a model without any."""
    state = find_state(model)
    return {} if state is None else dict(state.active)


def list_adapters(model: nn.Module) -> dict[str, LoRAConfig]:
    """All adapters of the model and what they were made of; empty for a model without any."""
    state = find_state(model)
    return {} if state is None else dict(state.configs)


def activate_adapters(
    model: nn.Module, names: str | Sequence[str] | Mapping[str, float], train: str | Sequence[str] | None = None
) -> None:
    """Make exactly these adapters take part: a layer's output is ``base(x) + Σ weight · update(x)``.

    Args:
        model: a model with adapters.
        names: one name, several, or a weight for each; weights are 1 unless given. None at all: the model's own output.
        train: those whose parameters train, all of ``names`` unless given.

    Raises:
        LLMBuilderError: an unknown name, ``train`` beyond ``names``, two adapters that both train a copy of one module
            (modules_to_save), or merged adapters. Nothing is changed then.
    """
    state = state_of(model)
    check_unmerged(state)
    names = [names] if isinstance(names, str) else names
    active = dict(names) if isinstance(names, Mapping) else dict.fromkeys(names, 1.0)
    train = list(active) if train is None else [train] if isinstance(train, str) else list(train)
    check_known(state, *active, *train)
    if not set(train) <= set(active):
        raise LLMBuilderError(f"train={train} names adapters that are not active: give them in names too")
    for wrapper in wrappers(model):
        whole = [name for name in active if name in shares_of(wrapper)]
        if isinstance(wrapper, TrainedCopy | TrainedRows) and len(whole) > 1:
            raise LLMBuilderError(f"{' and '.join(whole)} both train a copy of one module or rows of it: activate one")
    set_active(model, state, active, train)


def deactivate_adapter(model: nn.Module, name: str) -> None:
    """Take one adapter out of the active ones; it is kept, and no longer trains.

    Raises LLMBuilderError for an unknown name or while adapters are merged.
    """
    state = state_of(model)
    check_unmerged(state)
    check_known(state, name)
    set_active(model, state, *_without(model, state, name))


def delete_adapter(model: nn.Module, name: str) -> None:
    """Remove an adapter. Layers that carry no other are the original ones again, biases have their first values.

    Parameters of the model stay frozen. Raises LLMBuilderError for an unknown name or while adapters are merged.
    """
    state = state_of(model)
    check_unmerged(state)
    check_known(state, name)
    set_active(model, state, *_without(model, state, name))
    if state.biases is not None and state.biases.owner == name:
        state.biases = None
    del state.configs[name]
    for wrapper in wrappers(model):
        if name in shares_of(wrapper):
            del shares_of(wrapper)[name]
    unwrap(model, lambda wrapper: wrapper.base if len(shares_of(wrapper)) == 0 else None)


def combine_adapters(model: nn.Module, name: str, weights: Mapping[str, float], method: str = "cat") -> None:
    """Make a new adapter of a weighted sum of others, and make it the active one.

    ``"cat"`` is exact, ``ΔW = Σ w · scaling · B A``, and the ranks add up. ``"linear"`` keeps the rank, needs equal
    ones, and has cross terms: ``A = Σ sqrt(w · scaling) A``, ``B = Σ sqrt(w · scaling) B``. Both are PEFT's.

    Args:
        model: a model with adapters.
        name: what to call the new one.
        weights: adapters and their w; ``"linear"`` needs w ≥ 0.
        method: ``"cat"`` or ``"linear"``.

    Raises:
        LLMBuilderError: an unknown adapter or method, ranks that differ (``"linear"``), adapters with trained biases or
            modules_to_save, or merged adapters. Nothing is changed then.
    """
    state = state_of(model)
    check_unmerged(state)
    check_known(state, *weights)
    sources = [state.configs[other] for other in weights]
    if method not in ("cat", "linear"):
        raise LLMBuilderError(f"method='{method}' should be 'cat' or 'linear'")
    if not weights or (method == "linear" and min(weights.values()) < 0):
        raise LLMBuilderError("combine_adapters: give one adapter at least, and for 'linear' no negative weight")
    if any(config.bias != "none" or config.modules_to_save or config.trainable_token_indices for config in sources):
        raise LLMBuilderError("combine_adapters: adapters that train biases, tokens or whole modules can't be added up")
    plans, values = [], []
    for path, wrapper in named_wrappers(model):
        pieces = _combined(path, wrapper, weights, method)
        if pieces:
            plans.append(Plan(path, wrapper.base, {part: piece for part, (piece, _, _) in pieces.items()}, 1.0))
            values.append({part: (A, B) for part, (_, A, B) in pieces.items()})
    rank = max(piece.rank for plan in plans for piece in plan.pieces.values())
    config = LoRAConfig(
        rank=rank,
        alpha=rank,
        dropout=max(config.dropout for config in sources),
        target_modules=[plan.path for plan in plans],
    )
    attach(model, name, config, plans, {})
    updates = (shares_of(wrapper)[name] for _, wrapper in named_wrappers(model) if name in shares_of(wrapper))
    for update, given in zip(updates, values, strict=True):
        fill(update, given)


@contextmanager
def adapters_disabled(model: nn.Module) -> Iterator[None]:
    """Inside, the model computes what it did before it had adapters: with its first layers, biases and modules.

    Raises LLMBuilderError when the model has no adapters, or merged ones.
    """
    state = state_of(model)
    check_unmerged(state)
    before = state.enabled
    state.enabled = False
    state.switch_biases()
    try:
        yield
    finally:
        state.enabled = before
        state.switch_biases()


def fill(update: nn.Module, values: Mapping[str, tuple[Tensor, Tensor]]) -> None:
    """Set A and B of an update, by piece; values are copied into the update's own storage, dtype and device."""
    assert isinstance(update, Update)
    with torch.no_grad():
        for part, (A, B) in values.items():
            update.lora_A[part].copy_(A)
            update.lora_B[part].copy_(B)


def _without(model: nn.Module, state: AdapterState, name: str) -> tuple[dict[str, float], list[str]]:
    """The active adapters and those that train, but for one."""
    active = {other: weight for other, weight in state.active.items() if other != name}
    trained = {
        other
        for wrapper in wrappers(model)
        for other, share in shares_of(wrapper).items()
        if any(parameter.requires_grad for parameter in share.parameters())
    }
    return active, [other for other in active if other in trained]


@torch.no_grad()
def _combined(
    path: str, wrapper: Wrapper, weights: Mapping[str, float], method: str
) -> dict[str, tuple[Piece, Tensor, Tensor]]:
    """Each piece of the combination in one layer: what it is, its A and its B."""
    terms: dict[str, list[tuple[float, Update]]] = {}
    for name, weight in weights.items():
        update = dict(shares_of(wrapper)).get(name)
        if isinstance(update, Update):
            for part in update.pieces():
                terms.setdefault(part, []).append((weight * update.scaling, update))
    combined = {}
    for part, summands in terms.items():
        if method == "cat":
            A = torch.cat([factor * update.lora_A[part] for factor, update in summands])
            B = torch.cat([update.lora_B[part] for _, update in summands], 1)
        else:
            if len({len(update.lora_A[part]) for _, update in summands}) > 1:
                raise LLMBuilderError(f"'{path}': the adapters' ranks differ; method='cat' combines them")
            A = torch.stack([factor**0.5 * update.lora_A[part] for factor, update in summands]).sum(0)
            B = torch.stack([factor**0.5 * update.lora_B[part] for factor, update in summands]).sum(0)
        combined[part] = Piece(len(A), summands[0][1].pieces()[part].rows), A, B
    return combined
