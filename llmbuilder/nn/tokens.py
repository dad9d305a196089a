"""Rows of an embedding and of the output layer that an adapter trains: new tokens beside a frozen vocabulary.

The rows of an active adapter take the place of the layer's own, whose bits never change. PEFT calls this
``trainable_token_indices``.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .state import AdapterState


class TokenRows(nn.Module):
    """One adapter's rows of a table: ``indices`` [n] int64, ``rows`` [n, K] in fp32 (fp64 beside fp64), which start at
    the table's own. A table that two layers share has them once."""

    indices: Tensor

    def __init__(self, indices: Sequence[int], table: Tensor) -> None:
        super().__init__()
        self.register_buffer("indices", torch.tensor(list(indices), device=table.device), persistent=False)
        rows = table.detach()[self.indices]
        self.rows = nn.Parameter(rows.to(torch.promote_types(rows.dtype, torch.float32)))


class TrainedRows(nn.Module):
    """An embedding or output layer some rows of which the active adapter has of its own.

    Args:
        base: ``nn.Embedding`` or ``nn.Linear``; kept as it is.
        state: which adapters take part; the layers of a model share one.

    Attributes that this wrapper lacks are the base's.
    """

    wraps_base: ClassVar[bool] = True

    def __init__(self, base: nn.Module, state: AdapterState) -> None:
        super().__init__()
        self.base, self.state = base, state
        self.adapters = nn.ModuleDict()
        self.train(base.training)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        share = self.in_force()
        if share is None:
            return y
        return self._looked_up(x, y, share) if isinstance(self.base, nn.Embedding) else self._projected(x, y, share)

    def in_force(self) -> TokenRows | None:
        """The rows of the active adapter, of which one at most has any."""
        active = [name for name, weight in self.state.in_force.items() if weight and name in self.adapters]
        return self.adapters[active[0]] if active else None  # type: ignore[return-value]

    def merged(self) -> Tensor:
        """The base's weight with the active adapter's rows in their places, in its dtype."""
        weight, share = self.base.weight.detach().clone(), self.in_force()  # type: ignore[operator,union-attr]
        if share is not None:
            weight[share.indices] = share.rows.detach().to(weight.dtype)
        return weight

    def _looked_up(self, ids: Tensor, y: Tensor, share: TokenRows) -> Tensor:
        hits = ids[..., None] == share.indices
        rows = F.embedding(hits.int().argmax(-1), share.rows) * getattr(self.base, "embed_scale", 1.0)
        return torch.where(hits.any(-1, keepdim=True), rows.to(y.dtype), y)

    def _projected(self, x: Tensor, y: Tensor, share: TokenRows) -> Tensor:
        bias: Tensor | None = self.base.bias  # type: ignore[assignment]
        new = F.linear(x, share.rows.to(x.dtype), None if bias is None else bias[share.indices].to(x.dtype))
        return y.index_copy(-1, share.indices, new.to(y.dtype))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name in ("base", "adapters", "state"):  # half made, as inside deepcopy
                raise
            return getattr(self.base, name)
