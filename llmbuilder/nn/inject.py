"""Adding an adapter to a model: which layers, wrapped in place, everything else frozen."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..errors import ConfigError, LLMBuilderError, nearest
from ..models.names import Target, named_layers, part_rows, resolve
from .config import LoRAConfig
from .lora import WHOLE, LoRAEmbedding, LoRALinear, Piece, TrainedCopy
from .state import AdapterState, TrainedBiases, check_unmerged
from .tokens import TokenRows, TrainedRows
from .tree import Wrapper, find_state, places, shares_of, wrappers

LONGEST_NAME = 200  # bytes; file systems take 255


@dataclass(frozen=True)
class Plan:
    """One layer's share in a new adapter."""

    path: str
    module: nn.Module
    pieces: Mapping[str, Piece]
    scaling: float


def add_lora(model: nn.Module, config: LoRAConfig | None = None, name: str = "default") -> None:
    """Add an adapter that trains to a model, in place, and freeze all the rest.

    Each target layer becomes a :class:`LoRALinear` or :class:`LoRAEmbedding` that holds the layer itself; a layer that
    stands at two places is wrapped once, and serves both. The adapter starts at zero: the model's outputs stay the
    same. It becomes the only active adapter, and what trains is its A and B, biases as ``config.bias`` says, its
    copies of ``config.modules_to_save``, and its rows of ``config.trainable_token_indices``.

    Args:
        model: any module; names such as ``"attention"`` need an architecture of ``models.names``.
        config: rank 16 on the attention layers unless given.
        name: what to call the adapter; one that the model lacks so far.

    Raises:
        ConfigError: a target or module name that matches nothing, or a second adapter that trains biases.
        LLMBuilderError: the name is taken or unusable, or adapters are merged. The model is then as it was.
    """
    config = config or LoRAConfig()
    copied = modules_to_save(model, config.modules_to_save)
    targets = resolve(model, config.target_modules, exclude=list(copied))
    plans = [Plan(t.path, t.module, _pieces(model, t, config.rank), config.scaling) for t in targets]
    attach(model, name, config, plans, copied)


def attach(
    model: nn.Module, name: str, config: LoRAConfig, plans: Sequence[Plan], copied: Mapping[str, nn.Module]
) -> None:
    """Wrap what is not wrapped yet, give each wrapper the adapter's share, make it the active one, freeze the rest.

    The shares are the plans' updates, whole copies of ``copied``, and rows for ``config.trainable_token_indices``.

    Nothing is changed before everything is made.
    """
    state = find_state(model) or AdapterState()
    check_unmerged(state)
    _check_name(state, name)
    existing = {id(wrapper.base): wrapper for wrapper in wrappers(model)}
    tables = token_tables(model) if config.trainable_token_indices else {}
    places_of = places(model, [plan.module for plan in plans] + [*copied.values(), *tables.values()])
    made: list[tuple[Wrapper, nn.Module]] = []
    for plan in plans:
        wrapper = existing.get(id(plan.module)) or _wrapped(plan.module, state)
        if isinstance(wrapper, TrainedCopy | TrainedRows):
            raise LLMBuilderError(f"'{plan.path}' is trained whole by another adapter (modules_to_save, tokens)")
        made.append((wrapper, wrapper.new_update(plan.pieces, plan.scaling, config.dropout)))
    for path, module in copied.items():
        wrapper = existing.get(id(module)) or TrainedCopy(module, state)
        if not isinstance(wrapper, TrainedCopy) or any(True for _ in wrappers(module)):
            raise LLMBuilderError(f"modules_to_save: '{path}' carries low-rank adapters already")
        made.append((wrapper, copy.deepcopy(module)))
    made += _token_rows(state, config, tables, existing, {id(wrapper.base) for wrapper, _ in made})
    biases = _trained_biases(model, state, name, config, plans, copied)

    for wrapper, share in made:
        for parent, child in places_of[id(wrapper.base)] if id(wrapper.base) not in existing else ():
            parent._modules[child] = wrapper
        shares_of(wrapper)[name] = share
    state.configs[name] = config
    state.biases = biases or state.biases
    model.requires_grad_(False)
    set_active(model, state, {name: 1.0}, [name])


def set_active(model: nn.Module, state: AdapterState, active: Mapping[str, float], train: Sequence[str]) -> None:
    """Make exactly these adapters take part, and of all adapters' parameters exactly those of ``train`` train."""
    state.active = dict(active)
    state.switch_biases()
    for wrapper in wrappers(model):
        for name, share in shares_of(wrapper).items():
            share.requires_grad_(name in train)
    if state.biases is not None:
        for parameter in state.biases.parameters:
            parameter.requires_grad_(state.biases.owner in train)


def token_tables(model: nn.Module) -> dict[str, nn.Module]:
    """The embedding and the output layer, by path: what has a row for each token."""
    layers = {id(layer): path for path, layer in named_layers(model)}
    owners = [getattr(model, name, None) for name in ("get_input_embeddings", "get_output_embeddings")]
    found = [next(named_layers(get()))[1] for get in owners if get is not None and get() is not None]
    return {layers[id(layer)]: layer for layer in found}


def _token_rows(
    state: AdapterState,
    config: LoRAConfig,
    tables: Mapping[str, nn.Module],
    existing: Mapping[int, Wrapper],
    taken: set[int],
) -> list[tuple[Wrapper, nn.Module]]:
    """Wrappers of the tables, and the adapter's rows in them: one object where two layers share a weight."""
    made: list[tuple[Wrapper, nn.Module]] = []
    rows: dict[int, TokenRows] = {}
    for path, module in tables.items():
        wrapper = existing.get(id(module)) or TrainedRows(module, state)
        weight: Any = module.weight
        if not isinstance(wrapper, TrainedRows) or id(module) in taken:
            raise LLMBuilderError(f"trainable_token_indices: '{path}' carries other adapters already")
        if not isinstance(module, nn.Embedding | nn.Linear):
            raise LLMBuilderError(
                f"trainable_token_indices: '{path}' is a {type(module).__name__}, and has no such rows"
            )
        if max(config.trainable_token_indices) >= len(weight):
            raise ConfigError(
                f"trainable_token_indices: '{path}' has {len(weight)} rows, and {max(config.trainable_token_indices)} "
                "is none of them: add the tokens to the model first"
            )
        if id(weight) not in rows:
            rows[id(weight)] = TokenRows(config.trainable_token_indices, weight)
        made.append((wrapper, rows[id(weight)]))
    return made


def _wrapped(module: nn.Module, state: AdapterState) -> LoRALinear | LoRAEmbedding:
    return LoRAEmbedding(module, state) if isinstance(module, nn.Embedding) else LoRALinear(module, state)


def _pieces(model: nn.Module, target: Target, rank: int) -> dict[str, Piece]:
    if not target.parts:
        return {WHOLE: Piece(rank)}
    rows = part_rows(model, target.path)
    return {part: Piece(rank, rows[part]) for part in target.parts}


def modules_to_save(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Path and module of each module whose path ends with one of the names; a shared one once."""
    layers = dict(named_layers(model))
    found: dict[int, tuple[str, nn.Module]] = {}
    for name in names:
        matches = whole_modules(layers, [name])
        if not matches:
            leaves = sorted({path.rpartition(".")[2] for path in layers if path and not path[-1].isdigit()})
            raise ConfigError(
                f"modules_to_save: '{name}' matches no module of {type(model).__name__}{nearest(name, leaves) or '.'} "
                f"It has: {', '.join(leaves)}"
            )
        for path, module in matches.items():
            if isinstance(module, nn.ModuleList | nn.ModuleDict):
                raise ConfigError(
                    f"modules_to_save: '{path}' is a {type(module).__name__}, which is never called itself"
                )
            found.setdefault(id(module), (path, module))
    paths = [path for path, _ in found.values()]
    for path in paths:
        if any(path.startswith(f"{other}.") for other in paths):
            raise ConfigError(f"modules_to_save: '{path}' lies inside another module of the list")
    return dict(found.values())


def whole_modules(layers: Mapping[str, nn.Module], names: Sequence[str]) -> dict[str, nn.Module]:
    """PEFT's rule for modules_to_save: the path ends with a name, at a dot or not ("norm" fits "input_layernorm")."""
    return {path: module for path, module in layers.items() if path and path.endswith(tuple(names))}


def _check_name(state: AdapterState, name: str) -> None:
    if name in state.configs:
        raise LLMBuilderError(
            f"the model has an adapter called '{name}': choose another name, or delete that one first"
        )
    # Adapters live in nn.ModuleDicts, whose keys become attributes.
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise LLMBuilderError(f"'{name}' can't be the name of an adapter: use a plain word without dots")
    # They are also the names of folders.
    if any(sign in name for sign in "/\\\0") or len(name.encode()) > LONGEST_NAME:
        raise LLMBuilderError(
            f"'{name[:40]}' can't be the name of an adapter: use a word without slashes, {LONGEST_NAME} bytes at most"
        )


def _trained_biases(
    model: nn.Module,
    state: AdapterState,
    name: str,
    config: LoRAConfig,
    plans: Sequence[Plan],
    copied: Mapping[str, nn.Module],
) -> TrainedBiases | None:
    if config.bias == "none":
        return None
    if state.biases is not None:
        raise ConfigError(f"bias='{config.bias}': the adapter '{state.biases.owner}' trains biases, and only one can")
    if config.bias == "all":
        whole = list(copied.values()) + [w for w in wrappers(model) if isinstance(w, TrainedCopy)]
        apart = {id(parameter) for module in whole for parameter in module.parameters()}
        named = model.named_parameters()
        biases = [p for n, p in named if n.rpartition(".")[2] == "bias" and id(p) not in apart]
    else:
        own = [getattr(plan.module, "bias", None) for plan in plans]
        biases = [bias for bias in own if isinstance(bias, nn.Parameter)]
    return TrainedBiases(name, biases, [bias.detach().clone() for bias in biases])
