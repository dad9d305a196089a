"""Where in a model its adapters are: walking the wrappers, putting them in and taking them out."""

from collections.abc import Callable, Iterator, Sequence
from typing import TypeGuard

from torch import nn

from ..errors import LLMBuilderError
from ..models.names import named_layers
from .lora import LoRAEmbedding, LoRALinear, TrainedCopy
from .state import AdapterState
from .tokens import TrainedRows

Wrapper = LoRALinear | LoRAEmbedding | TrainedCopy | TrainedRows


def is_wrapper(module: nn.Module | None) -> TypeGuard[Wrapper]:
    """Whether a module holds what adapters have in the layer that it wraps."""
    return isinstance(module, Wrapper)


def wrappers(model: nn.Module) -> Iterator[Wrapper]:
    """The modules that hold adapters of this model, each once."""
    return (module for module in model.modules() if is_wrapper(module))


def named_wrappers(model: nn.Module) -> list[tuple[str, Wrapper]]:
    """The same with the path of the layer that each wraps, the first one of a shared layer, in the model's order."""
    left = {id(wrapper.base): wrapper for wrapper in wrappers(model)}
    found = ((path, left.pop(id(layer), None)) for path, layer in named_layers(model))
    return [(path, wrapper) for path, wrapper in found if wrapper is not None]


def shares_of(wrapper: Wrapper) -> nn.ModuleDict:
    """What each adapter has in a wrapper: updates, trained copies, or rows of tokens."""
    return wrapper.copies if isinstance(wrapper, TrainedCopy) else wrapper.adapters


def find_state(model: nn.Module) -> AdapterState | None:
    """The model's adapters, or None when it has none."""
    wrapper = next(wrappers(model), None)
    return None if wrapper is None else wrapper.state


def state_of(model: nn.Module) -> AdapterState:
    """The model's adapters. Raises LLMBuilderError when it has none."""
    state = find_state(model)
    if state is None:
        raise LLMBuilderError(f"{type(model).__name__} has no adapters: add one (add_lora) or load one (load_adapter)")
    return state


def places(model: nn.Module, modules: Sequence[nn.Module]) -> dict[int, list[tuple[nn.Module, str]]]:
    """Where in the tree each module stands: (parent, name in the parent), by the module's id.

    Raises LLMBuilderError for one that stands nowhere: the model itself.
    """
    found: dict[int, list[tuple[nn.Module, str]]] = {id(module): [] for module in modules}
    for parent in model.modules():
        for name, module in parent._modules.items():
            if module is not None and id(module) in found:
                found[id(module)].append((parent, name))
    if any(not stands for stands in found.values()):
        kind = type(model).__name__
        raise LLMBuilderError(f"{kind} is itself the layer to wrap: put it in another module, e.g. nn.Sequential")
    return found


def unwrap(model: nn.Module, instead: Callable[[Wrapper], nn.Module | None]) -> None:
    """Put in the place of each wrapper what ``instead`` gives for it; None leaves it."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            module = instead(child) if is_wrapper(child) else None
            if module is not None:
                parent._modules[name] = module
