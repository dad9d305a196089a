"""Adapters as PEFT writes them: a folder with ``adapter_config.json`` and ``adapter_model.safetensors``.

Names in the file: ``base_model.model.<path>.lora_A.weight`` [r, K] and ``lora_B`` [N, r], for embeddings
``lora_embedding_A`` and ``_B``, ``<path>.base_layer.bias`` for a trained bias of an adapted layer, and whole modules
under their own path. Rows of tokens are ``<path>.token_adapter.trainable_tokens_delta`` [n, K], and the tokenizer that
knows these tokens lies beside them.
The parts of a fused layer are written as the one update that they sum up to (A stacked, B block-placed), which any
reader understands; the safetensors header remembers them, and they are parts again when read here.
"""

import json
import os
import re
import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoTokenizer
from transformers.pytorch_utils import Conv1D

from ..errors import LLMBuilderError
from ..models.names import is_linear, named_layers, part_rows
from ..models.save import replacing
from ..models.vocabulary import grow_vocabulary
from .adapters import fill
from .config import LoRAConfig
from .inject import Plan, attach, whole_modules
from .lora import WHOLE, Piece, TrainedCopy, Update
from .peft_config import CONFIG, by_pattern, read_config, token_indices
from .state import check_known
from .tokens import TokenRows
from .tree import named_wrappers, shares_of, state_of

WEIGHTS, PICKLE = "adapter_model.safetensors", "adapter_model.bin"
PREFIX = "base_model.model."
# The header's entry for parts of fused layers: {path: {part: rank}}.
PARTS = "llmbuilder.parts"
TOKENS = "token_adapter.trainable_tokens_delta"


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], name: str | None = None) -> None:
    """Write one adapter in PEFT's format; ``load_adapter`` and ``peft.PeftModel.from_pretrained`` read it.

    The folder is replaced as a whole or not at all, other files in it are carried over. Weights of adapters (of several
    active ones) are not part of it: each is written as it is by itself.

    Args:
        model: a model with adapters, merged or not.
        folder: where to write it; made if it isn't there.
        name: which adapter; may be left out where only one is there or active.

    Raises:
        LLMBuilderError: no adapter, an unknown name, or none given where several would do.
    """
    state = state_of(model)
    name = name or _only(state.active) or _only(state.configs)
    if name is None:
        raise LLMBuilderError(f"save_adapter: which one? name= one of {', '.join(state.configs)}")
    check_known(state, name)
    config, tensors, parts = _exported(model, name)
    folder = Path(folder)
    with replacing(folder) as temporary:
        if folder.is_dir():
            shutil.copytree(folder, temporary, ignore=shutil.ignore_patterns(CONFIG, WEIGHTS))
        else:
            temporary.mkdir()
        metadata = {"format": "pt"} | ({PARTS: json.dumps(parts)} if parts else {})
        save_file(tensors, temporary / WEIGHTS, metadata=metadata)
        _sort_header(temporary / WEIGHTS)
        (temporary / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        tokenizer: Any = getattr(model, "tokenizer", None)
        if config["trainable_token_indices"] and tokenizer is not None:
            tokenizer.save_pretrained(temporary)


def load_adapter(model: nn.Module, folder: str | os.PathLike[str], name: str = "default") -> None:
    """Add the adapter that a folder holds in PEFT's format; it becomes the only active one, and trains.

    Args:
        model: the model that the adapter was made for, with or without other adapters.
        folder: written by ``save_adapter`` or by PEFT.
        name: what to call it.

    Raises:
        LLMBuilderError: the folder holds no adapter, or one of another kind, in pickle, damaged, or that does not fit
            this model (each text says what and where). The model is then as it was.
    """
    folder = Path(folder)
    config = read_config(folder)
    tensors, parts = _read_weights(folder)
    contents = _Contents(dict(named_layers(model)), config, folder)
    for key, tensor in tensors.items():
        contents.sort(key, tensor)
    plans, values = contents.plans(model, parts)
    _grow(model, config, folder)
    attach(model, name, contents.settings(plans), plans, contents.copied)
    for path, wrapper in named_wrappers(model):
        if path in values:
            fill(shares_of(wrapper)[name], values[path])
        elif path in contents.copied:
            shares_of(wrapper)[name].load_state_dict(contents.states[path])
        elif path in contents.rows:
            share: Any = shares_of(wrapper)[name]
            share.rows.data.copy_(contents.rows[path])
    with torch.no_grad():
        for path, bias in contents.biases.items():
            contents.layers[path].bias.copy_(bias)  # type: ignore[operator,union-attr]


class _Contents:
    """The tensors of a file, sorted by what they belong to and checked against the model's layers."""

    def __init__(self, layers: Mapping[str, nn.Module], config: Mapping[str, Any], folder: Path) -> None:
        self.layers, self.config, self.folder = layers, config, folder
        names = config.get("modules_to_save") or []
        for name in names:
            if not whole_modules(layers, [name]):
                raise self._misfit(f"modules_to_save has '{name}', which this model lacks")
        self.copied = whole_modules(layers, names)
        self.states: dict[str, dict[str, Tensor]] = {path: {} for path in self.copied}
        self.matrices: dict[str, dict[str, Tensor]] = {}
        self.biases: dict[str, Tensor] = {}
        self.rows: dict[str, Tensor] = {}
        self.tokens = token_indices(config, folder)

    def sort(self, key: str, tensor: Tensor) -> None:
        """Put one tensor where it belongs. Raises LLMBuilderError for one that belongs nowhere in the model."""
        path = key.removeprefix(PREFIX)
        inside = next((top for top in self.copied if path.startswith(f"{top}.")), None)
        low_rank = re.fullmatch(r"(.+)\.lora_(embedding_)?([AB])(\.weight)?", path)
        if inside:
            name = path.removeprefix(f"{inside}.")
            # With bias="all" PEFT writes such a module's bias three times; the plain name is the one that it reads.
            if not name.startswith(("modules_to_save.", "original_module.")):
                self.states[inside][name] = tensor
        elif low_rank:
            layer, embedding, which = self._layer(low_rank[1]), low_rank[2], low_rank[3]
            if not (isinstance(layer, nn.Embedding) if embedding else is_linear(layer)):
                raise self._misfit(f"'{low_rank[1]}' is a {type(layer).__name__} here, which {key} does not fit")
            self.matrices.setdefault(low_rank[1], {})[which] = tensor
        elif path.endswith(".bias") and self.config.get("bias", "none") != "none":
            path = path.removesuffix(".bias").removesuffix(".base_layer")
            self._expect(key, tensor, getattr(self._layer(path), "bias", None))
            self.biases[path] = tensor
        elif path.endswith(f".{TOKENS}"):
            path = path.removesuffix(f".{TOKENS}")
            table: Any = self._layer(path)
            self._expect(key, tensor, table.weight[: len(self.tokens)])
            self.rows[path] = tensor
        elif path.endswith(".base_layer.weight"):  # PEFT adds the base of an adapted embedding
            base = self._layer(path.removesuffix(".base_layer.weight")).weight
            self._expect(key, tensor, base)
            if not torch.equal(tensor.to(base), base):  # type: ignore[arg-type]
                raise self._misfit(f"{key} holds a base weight that differs from this model's")
        else:
            raise LLMBuilderError(f"{self.folder / WEIGHTS}: {key} belongs to no kind of adapter that is available")

    def plans(
        self, model: nn.Module, parts: Mapping[str, Mapping[str, int]]
    ) -> tuple[list[Plan], dict[str, dict[str, tuple[Tensor, Tensor]]]]:
        """What to attach, and the values of each layer's pieces. Raises LLMBuilderError where something is missing."""
        plans, values = [], {}
        for path, pair in self.matrices.items():
            if len(pair) < 2:
                raise LLMBuilderError(f"{self.folder / WEIGHTS}: '{path}' has lora_A or lora_B, but not both")
            A, B = pair["A"], pair["B"]
            N, K = _shape(self.layers[path])
            if A.dim() != 2 or B.dim() != 2 or A.shape[1] != K or B.shape[0] != N or len(A) != B.shape[1]:
                shapes = f"lora_A {list(A.shape)} and lora_B {list(B.shape)}"
                raise self._misfit(f"'{path}' has {K} inputs and {N} outputs here, which {shapes} do not fit")
            pieces, values[path] = _split(A, B, parts.get(path, {}), part_rows(model, path))
            alpha = by_pattern(self.config.get("alpha_pattern"), path, self.config["lora_alpha"])
            scaling = alpha / (len(A) ** 0.5 if self.config.get("use_rslora") else len(A))
            plans.append(Plan(path, self.layers[path], pieces, scaling))
        for path, state in self.states.items():
            expected = self.copied[path].state_dict()
            for key in expected.keys() | state.keys():
                self._expect(f"{path}.{key}", state.get(key), expected.get(key))
        if not plans:
            raise LLMBuilderError(f"{self.folder / WEIGHTS} holds no lora_A and lora_B")
        return plans, values

    def settings(self, plans: list[Plan]) -> LoRAConfig:
        """What the adapter would have been made of, rank and alpha those of most layers."""
        rslora = bool(self.config.get("use_rslora"))
        ranks = Counter((piece.rank, plan.scaling) for plan in plans for piece in plan.pieces.values())
        (rank, scaling), _ = ranks.most_common(1)[0]
        return LoRAConfig(
            rank=rank,
            alpha=_tidy(scaling * (rank**0.5 if rslora else rank)),
            dropout=self.config.get("lora_dropout", 0.0),
            target_modules=[plan.path for plan in plans],
            bias=self.config.get("bias", "none"),
            modules_to_save=list(self.copied),
            trainable_token_indices=self.tokens,
            use_rslora=rslora,
        )

    def _layer(self, path: str) -> nn.Module:
        if path not in self.layers:
            raise self._misfit(f"it has a weight for '{path}', which this model lacks")
        return self.layers[path]

    def _expect(self, key: str, tensor: Tensor | None, like: Any) -> None:
        given, wanted = (list(t.shape) if isinstance(t, Tensor) else "nothing" for t in (tensor, like))
        if given != wanted:
            raise self._misfit(f"it has {given} for {key}, the model {wanted}")

    def _misfit(self, problem: str) -> LLMBuilderError:
        base = self.config.get("base_model_name_or_path")
        return LLMBuilderError(f"the adapter in {self.folder} was made for {base or 'another model'}: {problem}")


def _exported(model: nn.Module, name: str) -> tuple[dict[str, Any], dict[str, Tensor], dict[str, dict[str, int]]]:
    """An adapter as PEFT's config, tensors and, for parts of fused layers, their ranks."""
    state = state_of(model)
    config = state.configs[name]
    tensors: dict[str, Tensor] = {}
    ranks, alphas, parts, tokens = {}, {}, {}, {}
    conv = False
    for path, wrapper in named_wrappers(model):
        share = dict(shares_of(wrapper)).get(name)
        if isinstance(share, Update):
            A, B = share.matrices()
            embedding = isinstance(wrapper.base, nn.Embedding)
            keys = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
            tensors |= {f"{PREFIX}{path}.{keys[0]}": A, f"{PREFIX}{path}.{keys[1]}": B}
            ranks[path] = len(A)
            alphas[path] = _tidy(share.scaling * (len(A) ** 0.5 if config.use_rslora else len(A)))
            conv = conv or isinstance(wrapper.base, Conv1D)
            if WHOLE not in share.lora_A:
                parts[path] = {part: piece.rank for part, piece in share.pieces().items()}
        elif isinstance(share, TokenRows):
            if all(rows is not share.rows for rows in tensors.values()):  # a head that shares them has no copy
                tensors[f"{PREFIX}{path}.{TOKENS}"] = share.rows
                tokens[path.rpartition(".")[2]] = share.indices.tolist()
        elif share is not None:
            tensors |= {f"{PREFIX}{path}.{key}": value for key, value in share.state_dict().items()}
    if state.biases is not None and state.biases.owner == name:
        tensors |= _exported_biases(model, set(ranks))
    rank, alpha = (Counter(found.values()).most_common(1)[0][0] for found in (ranks, alphas))
    base = getattr(model, "config", None)
    exported = {
        "peft_type": "LORA",
        # PEFT's wrapper for language models wants a model that generates as transformers' do.
        "task_type": "CAUSAL_LM" if hasattr(model, "prepare_inputs_for_generation") else None,
        "base_model_name_or_path": getattr(base, "_name_or_path", None) or None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {path: r for path, r in ranks.items() if r != rank},
        "alpha_pattern": {path: a for path, a in alphas.items() if a != alpha},
        "lora_dropout": config.dropout,
        "target_modules": list(ranks),
        "fan_in_fan_out": conv,
        "bias": config.bias,
        "modules_to_save": [p for p, w in named_wrappers(model) if isinstance(w, TrainedCopy) and name in w.copies]
        or None,
        # A list means the embedding, and a head that shares its weight.
        "trainable_token_indices": tokens if len(tokens) > 1 else next(iter(tokens.values()), None),
        "use_rslora": config.use_rslora,
    }
    return exported, {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}, parts


def _exported_biases(model: nn.Module, adapted: set[str]) -> dict[str, Tensor]:
    biases = state_of(model).biases
    assert biases is not None
    values = {
        id(parameter): parameter if biases.on else other
        for parameter, other in zip(biases.parameters, biases.others, strict=True)
    }
    return {
        f"{PREFIX}{path}{'.base_layer' if path in adapted else ''}.bias": values[id(module.bias)]
        for path, module in named_layers(model)
        if id(module._parameters.get("bias")) in values
    }


def _sort_header(path: Path) -> None:
    """Equal adapters are equal files: safetensors writes the metadata in any order."""
    with path.open("r+b") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode().ljust(size)
        assert len(text) == size
        file.seek(8)
        file.write(text)


def _grow(model: nn.Module, config: Mapping[str, Any], folder: Path) -> None:
    """Give the model the tokens that the adapter has rows of, and their tokenizer."""
    indices = token_indices(config, folder)
    if not indices:
        return
    if (folder / "tokenizer.json").is_file():
        model.tokenizer = AutoTokenizer.from_pretrained(folder, use_fast=True, trust_remote_code=False)
    grow_vocabulary(model, max(indices) + 1)


def _read_weights(folder: Path) -> tuple[dict[str, Tensor], dict[str, dict[str, int]]]:
    path = folder / WEIGHTS
    if not path.exists() and (folder / PICKLE).exists():
        raise LLMBuilderError(
            f"{folder / PICKLE} is a pickle, which can run code when it is read, and is refused: "
            f"save the adapter as {WEIGHTS} (PEFT's default)"
        )
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (no dictionary)
            return tensors, json.loads(metadata.get(PARTS, "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise LLMBuilderError(f"{path} can't be read: {error}") from None


def _split(
    A: Tensor, B: Tensor, ranks: Mapping[str, int], rows: Mapping[str, Tensor]
) -> tuple[dict[str, Piece], dict[str, tuple[Tensor, Tensor]]]:
    """The pieces of a layer's update: the parts that the file remembers, or the whole."""
    whole = {WHOLE: Piece(len(A))}, {WHOLE: (A, B)}
    if not ranks or not set(ranks) <= set(rows) or sum(ranks.values()) != len(A):
        return whole
    pieces = {part: Piece(rank, rows[part]) for part, rank in ranks.items()}
    sizes = list(ranks.values())
    parts = zip(ranks, torch.split(A, sizes), torch.split(B, sizes, 1), strict=True)
    values = {part: (a, b[rows[part]]) for part, a, b in parts}
    # Someone may have trained the file as a whole since; parts would then lose what lies outside their rows.
    return (
        whole if sum(int(b.count_nonzero()) for _, b in values.values()) != int(B.count_nonzero()) else (pieces, values)
    )


def _shape(layer: nn.Module) -> tuple[int, int]:
    """Outputs and inputs of a layer as an adapter sees them."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return (weight.shape[1], weight.shape[0]) if isinstance(layer, Conv1D | nn.Embedding) else tuple(weight.shape)  # type: ignore[return-value]


def _only(names: Mapping[str, Any]) -> str | None:
    return next(iter(names)) if len(names) == 1 else None


def _tidy(alpha: float) -> float:
    """2·r/r·r is a whole number again."""
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * abs(alpha) else alpha
