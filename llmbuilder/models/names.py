"""What a layer is called in each architecture: one table from the names of the settings to the modules' own.

    resolve(model, ["attention.query", "mlp"]) -> [Target("model.layers.0.self_attn.q_proj", ...), ...]

A name that the table gives as ``layer:part`` means certain rows of a fused layer's output (GPT-2's ``c_attn`` holds
query, key and value). Each part is adapted on its own, so that a setting means the same on fused and split models.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..errors import ConfigError, nearest
from .gpt import GPT

GROUPS = {
    "attention": ("attention.query", "attention.key", "attention.value", "attention.output"),
    "mlp": ("mlp.dense",),
}
SPECIAL = ("embeddings", "all", "all-linear")
# State-space models (Mamba, Jamba) multiply by this layer's weight themselves.
UNCALLED = "dt_proj"

Names = Mapping[str, tuple[str, ...]]

_NATIVE: Names = {
    "attention.query": ("attention.query",),
    "attention.key": ("attention.key",),
    "attention.value": ("attention.value",),
    "attention.output": ("attention.output",),
    "mlp.dense": ("mlp.gate", "mlp.up", "mlp.down"),
}
_LLAMA: Names = {
    "attention.query": ("self_attn.q_proj",),
    "attention.key": ("self_attn.k_proj",),
    "attention.value": ("self_attn.v_proj",),
    "attention.output": ("self_attn.o_proj",),
    "mlp.dense": ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
}
_GPT2: Names = {
    "attention.query": ("attn.c_attn:query",),
    "attention.key": ("attn.c_attn:key",),
    "attention.value": ("attn.c_attn:value",),
    "attention.output": ("attn.c_proj",),
    "mlp.dense": ("mlp.c_fc", "mlp.c_proj"),
}
_GPT_NEOX: Names = {
    "attention.query": ("attention.query_key_value:query",),
    "attention.key": ("attention.query_key_value:key",),
    "attention.value": ("attention.query_key_value:value",),
    "attention.output": ("attention.dense",),
    "mlp.dense": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
}
_BLOOM: Names = {
    "attention.query": ("self_attention.query_key_value:query",),
    "attention.key": ("self_attention.query_key_value:key",),
    "attention.value": ("self_attention.query_key_value:value",),
    "attention.output": ("self_attention.dense",),
    "mlp.dense": ("mlp.dense_h_to_4h", "mlp.dense_4h_to_h"),
}
_MPT: Names = {
    "attention.query": ("attn.Wqkv:query",),
    "attention.key": ("attn.Wqkv:key",),
    "attention.value": ("attn.Wqkv:value",),
    "attention.output": ("attn.out_proj",),
    "mlp.dense": ("ffn.up_proj", "ffn.down_proj"),
}
_GPTJ: Names = {
    "attention.query": ("attn.q_proj",),
    "attention.key": ("attn.k_proj",),
    "attention.value": ("attn.v_proj",),
    "attention.output": ("attn.out_proj",),
    "mlp.dense": ("mlp.fc_in", "mlp.fc_out"),
}
_GPT_NEO: Names = {
    "attention.query": ("attn.attention.q_proj",),
    "attention.key": ("attn.attention.k_proj",),
    "attention.value": ("attn.attention.v_proj",),
    "attention.output": ("attn.attention.out_proj",),
    "mlp.dense": ("mlp.c_fc", "mlp.c_proj"),
}
_PHI: Names = {**_LLAMA, "attention.output": ("self_attn.dense",), "mlp.dense": ("mlp.fc1", "mlp.fc2")}
_PHI3: Names = {
    "attention.query": ("self_attn.qkv_proj:query",),
    "attention.key": ("self_attn.qkv_proj:key",),
    "attention.value": ("self_attn.qkv_proj:value",),
    "attention.output": ("self_attn.o_proj",),
    "mlp.dense": ("mlp.gate_up_proj:gate", "mlp.gate_up_proj:up", "mlp.down_proj"),
}
_STARCODER2: Names = {**_LLAMA, "mlp.dense": ("mlp.c_fc", "mlp.c_proj")}
# Experts are no linear layers but stacks of weights, so that "mlp" has nothing that an adapter fits.
_MIXTURE: Names = {guide: own for guide, own in _LLAMA.items() if guide in GROUPS["attention"]}
_OPT: Names = {**_LLAMA, "attention.output": ("self_attn.out_proj",), "mlp.dense": ("fc1", "fc2")}
_LIKE_LLAMA = (
    *("llama", "qwen2", "qwen3", "mistral", "ministral", "gemma", "gemma2", "gemma3_text", "smollm3", "granite"),
    *("olmo", "olmo2", "olmo3", "stablelm", "cohere", "cohere2", "helium", "exaone4", "ernie4_5"),
)
FAMILIES: Mapping[str, Names] = {
    **dict.fromkeys(_LIKE_LLAMA, _LLAMA),
    **dict.fromkeys(("mixtral", "qwen2_moe", "qwen3_moe", "gpt_oss"), _MIXTURE),
    "starcoder2": _STARCODER2,
    "opt": _OPT,
    "gpt2": _GPT2,
    "gpt_neo": _GPT_NEO,
    "gpt_neox": _GPT_NEOX,
    "gptj": _GPTJ,
    "bloom": _BLOOM,
    "falcon": _BLOOM,
    "mpt": _MPT,
    "phi": _PHI,
    "phi3": _PHI3,
}


@dataclass(frozen=True)
class Target:
    """A layer to adapt: its path, the module, and the parts of its output (none: the whole)."""

    path: str
    module: nn.Module
    parts: tuple[str, ...] = ()


def resolve(model: nn.Module, target_modules: list[str] | str, exclude: Sequence[str] = ()) -> list[Target]:
    """The layers that ``target_modules`` names, each once, in the order of the model.

    Args:
        model: a causal language model; layers that carry an adapter already are found under their own path.
        target_modules: names as in ``LoRAConfig.target_modules``. A layer's own name means the whole layer, also where
            another name means a part of it.
        exclude: paths of modules that are left out, with all that they hold.

    Raises:
        ConfigError: a name that matches nothing (the text lists what the model has), or only layers that can't be
            adapted, or nothing that ``exclude`` leaves.
    """
    layers = dict(named_layers(model))
    found: dict[str, set[str]] = {}
    for name in [target_modules] if isinstance(target_modules, str) else target_modules:
        for path, part in _matches(model, layers, name):
            found.setdefault(path, set()).add(part)
    excluded = {id(module) for path in exclude for module in layers[path].modules()}
    left = {path: parts for path, parts in found.items() if id(layers[path]) not in excluded}
    if not left:
        raise ConfigError(f"target_modules={target_modules!r} names nothing outside {', '.join(exclude)}")
    targets: dict[int, Target] = {}
    for path, module in layers.items():
        if path in left:
            _check_use(path)
            _check_weight(path, module)
            parts = () if "" in left[path] else tuple(part for part in part_rows(model, path) if part in left[path])
            targets.setdefault(id(module), Target(path, module, parts))
    return list(targets.values())


def feed_forward(model: nn.Module) -> list[Target]:
    """The layers of the blocks' feed-forward parts; where they are not known by name, as those of mixtures, the whole
    modules called ``mlp``, experts and router.

    Raises:
        ConfigError: the model has neither.
    """
    if "mlp.dense" in _names(model):
        return resolve(model, "mlp")
    found = [Target(path, module) for path, module in named_layers(model) if _ends(path, "mlp")]
    if not found:
        raise ConfigError(f"the feed-forward layers of {type(model).__name__} are not known by name")
    return found


def named_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module with its path, a shared one at each of its places; a wrapper of an adapter counts as its base."""

    def walk(module: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
        while getattr(type(module), "wraps_base", False):
            module = module.base  # type: ignore[assignment]
        yield path, module
        for name, child in module._modules.items():
            if child is not None:
                yield from walk(child, f"{path}.{name}" if path else name)

    return walk(model, "")


def part_rows(model: nn.Module, path: str) -> dict[str, Tensor]:
    """For a fused layer the output rows of each of its parts, int64; for any other layer nothing."""
    fused = {own.partition(":")[0] for entry in _names(model).values() for own in entry if ":" in own}
    return _LAYOUTS[path.rpartition(".")[2]](model.config) if any(_ends(path, layer) for layer in fused) else {}


def is_linear(module: nn.Module) -> bool:
    """Whether a linear adapter fits: ``nn.Linear`` or transformers' ``Conv1D``, called as a module."""
    # The out_proj of nn.MultiheadAttention has this class; its weight is used, but the module is never called.
    uncalled = isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear)
    # A mixture's router may be a linear layer that returns more than its product: the experts that it chose.
    router = type(module).__name__.endswith("Router")
    return isinstance(module, nn.Linear | Conv1D) and not uncalled and not router


def _matches(model: nn.Module, layers: dict[str, nn.Module], name: str) -> list[tuple[str, str]]:
    """(path, part) of each layer that one name means; part is "" for the whole layer."""
    if name in ("all", "all-linear"):
        head = _layer(model, "get_output_embeddings")
        return [
            (path, "")
            for path, module in layers.items()
            if is_linear(module) and module is not head and not _ends(path, UNCALLED)
        ]
    if name == "embeddings":
        embeddings = _layer(model, "get_input_embeddings")
        if embeddings is not None:
            return [(path, "") for path, module in layers.items() if module is embeddings]
    table = _names(model)
    own = [own for guide in GROUPS.get(name, (name,)) for own in table.get(guide, ())] or [name]
    pairs = [(layer, part) for layer, _, part in (entry.partition(":") for entry in own)]
    named = [(path, part) for path in layers for layer, part in pairs if _ends(path, layer)]
    matches = [(path, part) for path, part in named if is_linear(layers[path]) or _is_embedding(layers[path])]
    if matches:
        return matches
    if named:
        kind = type(layers[named[0][0]]).__name__
        raise ConfigError(
            f"target_modules: '{name}' is a {kind}; adapters fit linear layers, Conv1D and embeddings only"
        )
    raise ConfigError(_nothing(model, layers, name))


def _nothing(model: nn.Module, layers: dict[str, nn.Module], name: str) -> str:
    table = _names(model)
    groups = [group for group, members in GROUPS.items() if any(name in table for name in members)]
    common = [*groups, *table, *SPECIAL]
    own = sorted({path.rpartition(".")[2] for path, m in layers.items() if is_linear(m) or _is_embedding(m)})
    return (
        f"target_modules: '{name}' matches no layer of {type(model).__name__}{nearest(name, [*common, *own]) or '.'} "
        f"It has: {', '.join(common)}; by their own names: {', '.join(own)}"
    )


def _names(model: nn.Module) -> Names:
    """The model's row of the table; empty for an architecture that has none."""
    if isinstance(model, GPT):
        return _NATIVE
    return FAMILIES.get(getattr(getattr(model, "config", None), "model_type", ""), {})


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _is_embedding(module: nn.Module) -> bool:
    return isinstance(module, nn.Embedding)


def _layer(model: nn.Module, getter: str) -> nn.Module | None:
    """What a model gives as its embeddings or head, without the wrapper of an adapter."""
    get = getattr(model, getter, None)
    layer = get() if get else None
    return None if layer is None else next(named_layers(layer))[1]


def _check_use(path: str) -> None:
    if _ends(path, UNCALLED):
        raise ConfigError(
            f"target_modules: '{path}' is never called, its weight is used directly, and an adapter would have no "
            "effect: leave it out"
        )


def _check_weight(path: str, module: nn.Module) -> None:
    weight = module.weight
    if not (isinstance(weight, Tensor) and weight.is_floating_point()):
        raise ConfigError(
            f"target_modules: the weight of '{path}' is quantised; adapters on quantised layers are not yet available: "
            "load the model in fp32, bf16 or fp16"
        )


def _thirds(config: Any) -> dict[str, Tensor]:
    """GPT-2, MPT: all of query, then all of key, then all of value."""
    rows = torch.arange(3 * config.hidden_size)
    return dict(zip(("query", "key", "value"), rows.chunk(3), strict=True))


def _grouped(config: Any) -> dict[str, Tensor]:
    """The query heads of the first group, its key and its value, then the second group's, and so on.

    GPT-NeoX, Bloom: a group is a head. Falcon: a head, all heads (``multi_query``), or those that share a key
    (``new_decoder_architecture``).
    """
    heads = config.num_attention_heads
    groups = 1 if getattr(config, "multi_query", False) else heads
    groups = config.num_kv_heads if getattr(config, "new_decoder_architecture", False) else groups
    each = heads // groups + 2
    rows = torch.arange(groups * each * (config.hidden_size // heads)).view(groups, each, -1)
    return {"query": rows[:, :-2].flatten(), "key": rows[:, -2].flatten(), "value": rows[:, -1].flatten()}


def _by_heads(config: Any) -> dict[str, Tensor]:
    """Phi-3: query heads, key heads, value heads; grouped attention has fewer of the latter two."""
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    query, key = size * config.num_attention_heads, size * config.num_key_value_heads
    rows = torch.arange(query + 2 * key)
    return dict(zip(("query", "key", "value"), torch.split(rows, [query, key, key]), strict=True))


def _halves(config: Any) -> dict[str, Tensor]:
    """Phi-3: all of gate, then all of up."""
    rows = torch.arange(2 * config.intermediate_size)
    return dict(zip(("gate", "up"), rows.chunk(2), strict=True))


_LAYOUTS: Mapping[str, Callable[[Any], dict[str, Tensor]]] = {
    "c_attn": _thirds,
    "query_key_value": _grouped,
    "Wqkv": _thirds,
    "qkv_proj": _by_heads,
    "gate_up_proj": _halves,
}
