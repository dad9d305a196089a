"""Layers that carry adapters: a frozen linear layer or embedding, and low-rank updates of its output.

    y = base(x) + Σ over active adapters of  weight · scaling · drop(x) Aᵀ Bᵀ        (Hu et al. 2021, arXiv 2106.09685)

Several updates of one layer are stacked into one: rows of A, columns of B. So are the parts of a fused layer, each of
which has its own A and its own rows of B.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

from .. import ops
from .state import AdapterState

# What the piece of an adapter that covers a layer's whole output is called.
WHOLE = "weight"


@dataclass(frozen=True)
class Piece:
    """A low-rank matrix of an adapter: its rank, and the rows of the layer's output that it updates (None: all)."""

    rank: int
    rows: Tensor | None = None


@dataclass(frozen=True)
class Term:
    """One summand of a layer's output: ``scaling · dropout(x, p) Aᵀ Bᵀ``, A [r, K] and B [N, r]."""

    A: Tensor
    B: Tensor
    scaling: float
    p: float


class Update(nn.Module):
    """One adapter's share in one layer: the sum of its pieces, each an A and a B, times ``scaling``.

    Args:
        pieces: by name, ``WHOLE`` or the names of parts.
        in_features, out_features: K and N of the layer.
        scaling: the factor of the update.
        p: dropout of the update's input, in training mode.
        like: the base's weight; A and B live on its device, in fp32 (fp64 beside fp64). Their values are not set here.
    """

    def __init__(
        self, pieces: Mapping[str, Piece], in_features: int, out_features: int, scaling: float, p: float, like: Tensor
    ) -> None:
        super().__init__()
        self.out_features, self.scaling, self.p = out_features, scaling, p
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        dtype = torch.promote_types(like.dtype, torch.float32)
        for name, piece in pieces.items():
            rows = None if piece.rows is None else piece.rows.to(like.device)
            outputs = out_features if rows is None else len(rows)
            self.register_buffer(f"rows_{name}", rows, persistent=False)
            self.lora_A[name] = nn.Parameter(torch.empty(piece.rank, in_features, dtype=dtype, device=like.device))
            self.lora_B[name] = nn.Parameter(torch.empty(outputs, piece.rank, dtype=dtype, device=like.device))

    def pieces(self) -> dict[str, Piece]:
        """The rank and the rows of each piece."""
        return {name: Piece(len(A), getattr(self, f"rows_{name}")) for name, A in self.lora_A.items()}

    def matrices(self) -> tuple[Tensor, Tensor]:
        """A [R, K] and B [N, R] of the whole update, R the sum of the ranks; gradients flow to the pieces."""
        columns = []
        for name, piece in self.pieces().items():
            B = self.lora_B[name]
            if piece.rows is not None:
                B = B.new_zeros(self.out_features, piece.rank).index_copy(0, piece.rows, B)
            columns.append(B)
        return _joined(list(self.lora_A.values()), 0), _joined(columns, 1)

    def term(self, weight: float) -> Term:
        """The update as a summand of the layer's output."""
        return Term(*self.matrices(), weight * self.scaling, self.p if self.training else 0.0)


class LoRALinear(nn.Module):
    """A frozen linear layer with any number of low-rank adapters.

    ``y = linear(x, W, b) + Σ weight · scaling · dropout(x, p) Aᵀ Bᵀ`` over the active adapters, by ``ops.lora_linear``;
    dropout in training mode only, its mask drawn anew at each call from torch's generator.

    Args:
        base: ``nn.Linear``, transformers' ``Conv1D``, or a subclass of either (whose own forward is then called and the
            update added); kept as it is, with its bias.
        state: which adapters take part; the layers of a model share one.

    ``weight``, ``bias``, ``in_features`` and ``out_features`` are the base's; ``adapters[name]`` is an :class:`Update`.
    """

    wraps_base: ClassVar[bool] = True

    def __init__(self, base: nn.Module, state: AdapterState) -> None:
        super().__init__()
        self.base, self.state = base, state
        self.adapters = nn.ModuleDict()
        self.train(base.training)

    @property
    def weight(self) -> Tensor:
        return _parameter(self.base)

    @property
    def bias(self) -> Tensor | None:
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        return bias

    @property
    def in_features(self) -> int:
        return matrix(self.base).shape[1]

    @property
    def out_features(self) -> int:
        return matrix(self.base).shape[0]

    def new_update(self, pieces: Mapping[str, Piece], scaling: float, p: float) -> Update:
        """An update that starts at zero: A Kaiming-uniform with a = sqrt(5), B zero."""
        update = Update(pieces, self.in_features, self.out_features, scaling, p, self.weight)
        for A, B in zip(update.lora_A.values(), update.lora_B.values(), strict=True):
            nn.init.kaiming_uniform_(A, a=math.sqrt(5))
            nn.init.zeros_(B)
        return update.train(self.training)

    def forward(self, x: Tensor) -> Tensor:
        return adapted_linear(self.base, x, [update.term(weight) for update, weight in _in_force(self)])

    def delta(self) -> Tensor:
        """What the active adapters add to the weight, in the weight's own layout, in fp32 (fp64 for fp64)."""
        delta = _delta(self, matrix(self.base).shape)
        return delta.t() if isinstance(self.base, Conv1D) else delta


class LoRAEmbedding(nn.Module):
    """A frozen embedding with low-rank adapters: ``base(ids) + Σ weight · scaling · embed_scale · A[:, ids]ᵀ Bᵀ``.

    A [r, number of embeddings] starts at zero, B [width, r] normal, and there is no dropout: all as in PEFT.
    ``embed_scale`` is Gemma's, where the base has one. Arguments and attributes are those of :class:`LoRALinear`.
    """

    wraps_base: ClassVar[bool] = True

    def __init__(self, base: nn.Embedding, state: AdapterState) -> None:
        super().__init__()
        self.base, self.state = base, state
        self.adapters = nn.ModuleDict()
        self.train(base.training)

    @property
    def weight(self) -> Tensor:
        return self.base.weight

    @property
    def num_embeddings(self) -> int:
        return self.base.num_embeddings

    @property
    def embedding_dim(self) -> int:
        return self.base.embedding_dim

    @property
    def padding_idx(self) -> int | None:
        return self.base.padding_idx

    def new_update(self, pieces: Mapping[str, Piece], scaling: float, p: float) -> Update:
        """An update that starts at zero: A zero, B standard normal; ``p`` has no meaning for token ids."""
        update = Update(pieces, self.num_embeddings, self.embedding_dim, scaling, 0.0, self.weight)
        for A, B in zip(update.lora_A.values(), update.lora_B.values(), strict=True):
            nn.init.zeros_(A)
            nn.init.normal_(B)
        return update.train(self.training)

    def forward(self, ids: Tensor) -> Tensor:
        y: Tensor = self.base(ids)
        for update, weight in _in_force(self):
            term = update.term(weight)
            delta = F.linear(F.embedding(ids, term.A.t(), self.padding_idx), term.B)
            y = y + (delta * term.scaling * getattr(self.base, "embed_scale", 1.0)).to(y.dtype)
        return y

    def delta(self) -> Tensor:
        """What the active adapters add to the weight, in fp32 (fp64 for fp64)."""
        return _delta(self, self.weight.t().shape).t()


class TrainedCopy(nn.Module):
    """A module of which an adapter has a copy that trains whole; the original serves while that adapter is off.

    Of the adapters that have a copy one can be active at a time. Attributes that this wrapper lacks are those of the
    module that serves.
    """

    wraps_base: ClassVar[bool] = True

    def __init__(self, base: nn.Module, state: AdapterState) -> None:
        super().__init__()
        self.base, self.state = base, state
        self.copies = nn.ModuleDict()
        self.train(base.training)

    def serving(self) -> nn.Module:
        """The active adapter's copy, or the original."""
        active = self.state.active if self.state.enabled else {}
        return next((self.copies[name] for name in active if name in self.copies), self.base)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.serving()(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base", "copies", "state") or "state" not in self.__dict__:  # half made, as inside deepcopy
                raise
            return getattr(self.serving(), name)


def adapted_linear(base: nn.Module, x: Tensor, terms: Sequence[Term]) -> Tensor:
    """``base(x) + Σ scaling · dropout(x, p) Aᵀ Bᵀ``: one fused operator for all terms of equal p.

    A base that is more than a product with its weight (a subclass's forward, hooks) is called as it is.
    """
    if not terms:
        y: Tensor = base(x)
        return y
    first, *others = _stacked(terms)
    if _is_plain(base):
        bias: Tensor | None = base.bias  # type: ignore[assignment]
        y = ops.lora_linear(x, matrix(base), bias, first.A, first.B, first.scaling, first.p)
    else:
        y, others = base(x), [first, *others]
    for term in others:
        y = y + ops.lora_delta(x, term.A, term.B, term.scaling, term.p)
    return y


def matrix(base: nn.Module) -> Tensor:
    """A linear layer's weight as [N, K]; Conv1D keeps it transposed."""
    weight = _parameter(base)
    return weight.t() if isinstance(base, Conv1D) else weight


def _parameter(base: nn.Module) -> Tensor:
    weight = base.weight
    assert isinstance(weight, Tensor)
    return weight


def _is_plain(base: nn.Module) -> bool:
    own = type(base).forward in (nn.Linear.forward, Conv1D.forward) and "forward" not in base.__dict__
    return own and not base._forward_hooks and not base._forward_pre_hooks and not base._backward_hooks


def _in_force(layer: LoRALinear | LoRAEmbedding) -> list[tuple[Update, float]]:
    """The layer's updates that take part, with their weights."""
    return [
        (layer.adapters[name], weight)  # type: ignore[misc]
        for name, weight in layer.state.in_force.items()
        if weight != 0.0 and name in layer.adapters
    ]


def _stacked(terms: Sequence[Term]) -> list[Term]:
    """The same sum with one term for each p. Different factors move into B."""
    stacks: dict[float, list[Term]] = {}
    for term in terms:
        stacks.setdefault(term.p, []).append(term)
    result = []
    for p, stack in stacks.items():
        if len({term.scaling for term in stack}) == 1:
            columns, scaling = [term.B for term in stack], stack[0].scaling
        else:
            columns, scaling = [term.B * term.scaling for term in stack], 1.0
        result.append(Term(_joined([term.A for term in stack], 0), _joined(columns, 1), scaling, p))
    return result


def _joined(tensors: Sequence[Tensor], dim: int) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors), dim)


@torch.no_grad()
def _delta(layer: LoRALinear | LoRAEmbedding, shape: torch.Size) -> Tensor:
    """Σ weight · scaling · B A over the active adapters, [N, K]."""
    dtype = torch.promote_types(layer.weight.dtype, torch.float32)
    delta = torch.zeros(shape, dtype=dtype, device=layer.weight.device)
    for update, weight in _in_force(layer):
        term = update.term(weight)
        delta.addmm_(term.B.to(dtype), term.A.to(dtype), alpha=term.scaling)
    return delta
