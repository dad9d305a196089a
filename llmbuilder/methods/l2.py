"""L2-SP: the weights are held where the task found them (arXiv 1802.01483).

    loss + λ/2 · Σ (θ - θ₀)²                weights that train as they are
    loss + λ/2 · Σ ‖s (B A - B₀ A₀)‖²       low-rank adapters: the drift of the layer's weight

The drift of an adapter is never formed: with C = [B - B₀, B₀] and D = [A; A - A₀] it is s·C D, and

    ‖C D‖² = Σ (Cᵀ C) ∘ (D Dᵀ)      ∂/∂B = C (D Aᵀ) of half of it      ∂/∂A = (Bᵀ C) D

need nothing larger than the factors: Gram matrices of [2r, 2r]. A small drift is a sum of small terms in this form;
in that of [B, -B₀] and [A; A₀] large ones would cancel.
"""

from typing import Any

import torch
from torch import Tensor, nn

from ..nn.lora import LoRAEmbedding, LoRALinear, Update
from ..ops import ewc_penalty_
from .base import Run


class L2:
    """Holds the weights that train, or the effective weights of adapted layers, where the task found them.

    Args:
        strength: λ.
    """

    name = "l2"

    def __init__(self, strength: float) -> None:
        self.strength = strength
        self._anchors: dict[str, Tensor] = {}

    def prepare(self, run: Run) -> None:
        trained = {name: weight for name, weight in run.model.named_parameters() if weight.requires_grad}
        self._pairs = list(adapter_pairs(run.model, trained))
        paired = {name for pair in self._pairs for name in pair[:2]}
        self._adapters = {name: weight for name, weight in trained.items() if name in paired}
        self._weights = {name: weight for name, weight in trained.items() if name not in paired}

    def before_task(self, run: Run) -> None:
        params = self._weights | self._adapters
        self._anchors = {
            name: weight.detach().clone(memory_format=torch.contiguous_format) for name, weight in params.items()
        }

    def penalty(self) -> float:
        """Of the weights that train for now."""
        weights = {name: weight for name, weight in self._weights.items() if weight.requires_grad}
        anchors = [self._anchors[name] for name in weights]
        value = float(ewc_penalty_(list(weights.values()), anchors, None, self.strength))
        for a, b, scaling in self._pairs:
            A, B = self._adapters[a], self._adapters[b]
            if A.requires_grad:
                value += drift_penalty_(A, B, self._anchors[a], self._anchors[b], self.strength * scaling**2)
        return value

    def state(self) -> dict[str, Any]:
        return dict(self._anchors)

    def load_state(self, state: dict[str, Any]) -> None:
        params = self._weights | self._adapters
        self._anchors = {name: value.to(params[name].device) for name, value in state.items()}


@torch.no_grad()
def drift_penalty_(A: Tensor, B: Tensor, A0: Tensor, B0: Tensor, strength: float) -> float:
    """``strength/2 · ‖B A - B₀ A₀‖²``; adds its gradient to ``A.grad`` and ``B.grad`` (a missing one starts at zero).

    Args:
        A: [r, K], and B: [N, r]; A0, B0: like them, all of one floating dtype, in which it is computed.
        strength: factor of the whole.
    """
    C, D = torch.cat([B - B0, B0], 1), torch.cat([A, A - A0])
    for weight, gradient in ((B, C @ (D @ A.t())), (A, (B.t() @ C) @ D)):
        weight.grad = strength * gradient if weight.grad is None else weight.grad.add_(gradient, alpha=strength)
    return strength / 2 * float(((C.t() @ C) * (D @ D.t())).sum(dtype=torch.float64))


def adapter_pairs(model: nn.Module, trained: dict[str, nn.Parameter]) -> list[tuple[str, str, float]]:
    """The names of each trained A and its B, and the factor of their product in the layer's weight."""
    names = {id(weight): name for name, weight in trained.items()}
    return [
        (names[id(A)], names[id(update.lora_B[part])], update.scaling)
        for layer in model.modules()
        if isinstance(layer, LoRALinear | LoRAEmbedding)
        for update in layer.adapters.values()
        if isinstance(update, Update)
        for part, A in update.lora_A.items()
        if id(A) in names
    ]
