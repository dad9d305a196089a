"""Adapters folded into the weights, and taken out again to the bit."""

import torch
from torch import nn

from ..errors import LLMBuilderError
from .lora import LoRAEmbedding, LoRALinear, TrainedCopy
from .state import Merge, check_unmerged
from .tokens import TrainedRows
from .tree import Wrapper, find_state, named_wrappers, shares_of, state_of, unwrap


@torch.no_grad()
def merge_lora(model: nn.Module, keep_base: bool = True, untie: bool = False) -> None:
    """Fold the active adapters into the weights: ``W + Σ weight · scaling · B A``, computed in fp32, in W's dtype.

    Args:
        model: a model with adapters.
        keep_base: keep each W, so that :func:`unmerge_lora` restores it; the layers go on holding their adapters,
            switched off. False: no W is kept and the model is left plain, every layer its original module, trained
            copies in their modules' places, no adapters; it can be saved as a whole.
        untie: let a merged layer that shares its weight with another one (an embedding and its head) part with it.

    Raises:
        LLMBuilderError: no adapters, adapters that are merged already or disabled, or a shared weight without
            ``untie``. Nothing is changed then.
    """
    state = state_of(model)
    check_unmerged(state)
    if not state.enabled:
        raise LLMBuilderError("the adapters are disabled, there is nothing to merge: leave adapters_disabled first")
    # A trained copy serves as it is; only where wrappers go does it take its module's place.
    changed = [
        (path, wrapper)
        for path, wrapper in named_wrappers(model)
        if set(shares_of(wrapper)) & set(state.active) and not (keep_base and isinstance(wrapper, TrainedCopy))
    ]
    ties = _ties(model, changed)
    if ties and not untie:
        raise LLMBuilderError(
            f"{ties[0][0]} and {ties[0][1]} share one weight, and merging changes it for one of them only: "
            "untie=True makes them two weights"
        )
    config = getattr(model, "config", None)
    merge = Merge([], bool(getattr(config, "tie_word_embeddings", False)))
    merged: dict[int, nn.Parameter] = {}  # tokens' rows of two layers that share a weight stay one weight
    for _, wrapper in changed:
        if not isinstance(wrapper, TrainedCopy):
            old = wrapper.weight
            assert isinstance(old, nn.Parameter)
            if keep_base:
                merge.kept.append((wrapper.base, old))
            wrapper.base.weight = merged.setdefault(id(old), _merged(wrapper, old))
    if ties and config is not None:
        config.tie_word_embeddings = False
    state.merge = merge
    if not keep_base:
        unwrap(model, lambda wrapper: wrapper.serving() if isinstance(wrapper, TrainedCopy) else wrapper.base)


def unmerge_lora(model: nn.Module) -> None:
    """Undo :func:`merge_lora`: every weight is what it was, bit for bit, and the active adapters take part again.

    Raises LLMBuilderError when nothing is merged, or when it was merged with ``keep_base=False``.
    """
    state = find_state(model)
    if state is None or state.merge is None:
        raise LLMBuilderError(
            "no merged adapters to take out of the weights; a merge with keep_base=False can't be undone: "
            "load the model again"
        )
    for module, old in state.merge.kept:
        old.data = old.data.to(module.weight)  # type: ignore[arg-type]  # the model may have moved since
        module.weight = old
    if state.merge.tied:
        model.config.tie_word_embeddings = True  # type: ignore[union-attr,assignment]
    state.merge = None


def _merged(wrapper: LoRALinear | LoRAEmbedding | TrainedRows, old: nn.Parameter) -> nn.Parameter:
    weight = wrapper.merged() if isinstance(wrapper, TrainedRows) else (old + wrapper.delta()).to(old.dtype)
    return nn.Parameter(weight, requires_grad=False)


def _ties(model: nn.Module, changed: list[tuple[str, Wrapper]]) -> list[tuple[str, str]]:
    """(layer, its weight's other name) for each layer to change whose weight another module has too."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for path, module in model.named_modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append((f"{path}.{name}", module))
    ties = []
    for path, wrapper in changed:
        if isinstance(wrapper, TrainedRows):
            continue  # both layers have the adapter's rows
        own = set(wrapper.base.modules())
        weights = wrapper.base.parameters() if isinstance(wrapper, TrainedCopy) else [wrapper.weight]
        ties += [(path, other) for w in weights for other, module in owners[id(w)] if module not in own]
    return ties
