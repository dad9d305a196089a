"""The LoRA operators in Triton, one file each.

    forward    S = drop(x) Aᵀ        y = scaling S Bᵀ + b
    backward   dS = scaling dY B     dB = scaling dYᵀ S     dA = dSᵀ drop(x)     dX = drop'(dS A)

Shapes: x, dX [M, K]; y, dY [M, N]; A [r, K]; B [N, r]; S, dS [M, r], all of one dtype; dA and dB are fp32. Columns lie
side by side, rows any step apart. Sums are fp32, in an order that the shapes alone determine; there are no atomics:
where programs share a result they write partial sums, which a second launch adds up in order.
"""

from .lora_expand import lora_expand, lora_expand_
from .lora_fused import lora_fused, lora_fused_grad
from .lora_grad_ax import lora_grad_ax
from .lora_grad_sb import lora_grad_sb
from .lora_shrink import lora_shrink

__all__ = [
    "lora_expand",
    "lora_expand_",
    "lora_fused",
    "lora_fused_grad",
    "lora_grad_ax",
    "lora_grad_sb",
    "lora_shrink",
]
