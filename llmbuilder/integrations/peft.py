"""Run PEFT's LoRA layers through the fused operator; the model, its parameters and its files stay PEFT's."""

from dataclasses import dataclass
from types import MethodType
from typing import Any

from peft.tuners.lora import Linear as PeftLinear
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..nn.lora import Term, adapted_linear


@dataclass(frozen=True)
class Fused:
    """What :func:`fuse` did: the paths of the layers that are fused, and of those that are not, with the reason."""

    layers: list[str]
    left_alone: dict[str, str]


def fuse(model: nn.Module) -> Fused:
    """Let every plain LoRA layer of a PEFT model compute with ``ops.lora_linear``, in place.

    The same sums as before, ``base(x) + Σ scaling · dropout(x) Aᵀ Bᵀ``, in x's dtype with fp32 sums (PEFT computes the
    update in the adapters' dtype), the dropout masks drawn by ``ops.dropout``. Saving, merging, disabling, switching
    and adding adapters work as before: whatever the operator does not serve (merged or disabled layers, DoRA and other
    variants, ``lora_bias``, a batch with ``adapter_names``) goes to PEFT's own forward, at each call.

    Args:
        model: a model that PEFT has wrapped.

    Returns:
        Which layers are fused, and why others are not.
    """
    layers, left_alone = [], {}
    for path, layer in model.named_modules():
        if type(layer) is PeftLinear:
            base = layer.get_base_layer()
            if isinstance(base, nn.Linear | Conv1D) and base.weight.is_floating_point():
                layer.forward = MethodType(_forward, layer)
                layers.append(path)
            else:
                left_alone[path] = f"its base is a {type(base).__name__}"
        elif hasattr(layer, "lora_A"):
            left_alone[path] = f"it is a {type(layer).__module__}.{type(layer).__qualname__}"
    return Fused(layers, left_alone)


def unfuse(model: nn.Module) -> None:
    """Undo :func:`fuse`."""
    for layer in model.modules():
        if type(layer) is PeftLinear:
            layer.__dict__.pop("forward", None)


def _forward(layer: PeftLinear, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    own = layer.disable_adapters or layer.merged or args or any(value is not None for value in kwargs.values())
    if own or any(layer.lora_bias[name] or name in layer.lora_variant for name in names):
        y: Tensor = PeftLinear.forward(layer, x, *args, **kwargs)
        return y
    return adapted_linear(layer.get_base_layer(), x, [_term(layer, name) for name in names])


def _term(layer: PeftLinear, name: str) -> Term:
    dropout = layer.lora_dropout[name]
    p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
    return Term(layer.lora_A[name].weight, layer.lora_B[name].weight, layer.scaling[name], p)
