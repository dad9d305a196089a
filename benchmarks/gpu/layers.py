"""One LoRA layer by each competitor: a function of x, its adapters, and the mask that a call would draw.

unsloth and LoRAFusion need a GPU and stacks of their own, so their ways are written down here in plain torch: the same
operators in the same order, with the same tensors kept for the backward pass. A line of COMPETITORS adds another.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from unittest.mock import patch

import torch
from stage import Stage, backend
from torch import Tensor, nn

from llmbuilder import ops

R, ALPHA = 16, 32
SCALING = ALPHA / R


@dataclass
class Layer:
    call: Callable[[Tensor], Tensor]
    a: Tensor  # [r, K]
    b: Tensor  # [N, r]
    mask: Callable[[tuple[int, int]], Tensor]  # keep / (1 - p) of the next call, torch's generator in the same state
    context: Callable[[], AbstractContextManager] = nullcontext  # to call within, forward and backward

    def step(self, x: Tensor, dY: Tensor) -> Tensor:
        """Forward and backward; gradients are assigned."""
        for tensor in (x, self.a, self.b):
            if tensor is not None:
                tensor.grad = None
        with self.context():
            y = self.call(x)
            y.backward(dY)
        return y


class Unsloth(torch.autograd.Function):
    """`matmul_lora` of unsloth/kernels/fast_lora.py: S is computed again in the backward pass; no dropout."""

    @staticmethod
    def forward(ctx, x, W, A, B):
        ctx.save_for_backward(x, W, A, B)
        y = x @ W.t()
        return y.addmm_(x @ A.t(), B.t(), alpha=SCALING)

    @staticmethod
    def backward(ctx, dY):
        x, W, A, B = ctx.saved_tensors
        dS = dY @ B
        dA = SCALING * (dS.t() @ x)
        dB = SCALING * (dY.t() @ (x @ A.t()))
        dX = dY @ W
        return dX.addmm_(dS, A, alpha=SCALING), None, dA, dB


class LoRAFusion(torch.autograd.Function):
    """Zhu et al. 2025 (arXiv 2510.00206), section 4: the base product is fused with the update's, dropout with the
    down projection; drop(x) and the mask are kept. Here each fused pair is torch's two operators with beta = 1."""

    @staticmethod
    def forward(ctx, x, W, A, B, p):
        dropped, keep = torch.native_dropout(x, p, True) if p else (x, None)
        S = dropped @ A.t()
        y = x @ W.t()
        y.addmm_(S, B.t(), alpha=SCALING)
        ctx.p = p
        ctx.save_for_backward(dropped, keep, S, W, A, B)
        return y

    @staticmethod
    def backward(ctx, dY):
        dropped, keep, S, W, A, B = ctx.saved_tensors
        dS = (dY @ B) * SCALING
        dA, dB = dS.t() @ dropped, SCALING * (dY.t() @ S)
        dX = dY @ W
        if keep is None:
            dX.addmm_(dS, A)
        else:
            dX += torch.ops.aten.native_dropout_backward(dS @ A, keep, 1 / (1 - ctx.p))
        return dX, None, dA, dB, None


def frozen(stage, W, p):
    return Layer(lambda x: nn.functional.linear(x, W), None, None, None)


def peft(stage, W, p):
    import peft

    base = nn.Linear(W.shape[1], W.shape[0], bias=False, device=W.device, dtype=W.dtype).requires_grad_(False)
    base.weight.data = W
    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=p, target_modules=["0"])
    layer = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False).base_model.model[0].train()
    return Layer(layer, layer.lora_A["default"].weight, layer.lora_B["default"].weight, _torch_mask(stage, W.dtype, p))


def unsloth_style(stage, W, p):
    a, b = _adapters(stage, W)
    return Layer(lambda x: Unsloth.apply(x, W, a, b), a, b, None)


def lorafusion_style(stage, W, p):
    a, b = _adapters(stage, W)

    def mask(shape):
        return torch.native_dropout(torch.ones(shape, dtype=W.dtype, device=W.device), p, True)[0]

    return Layer(lambda x: LoRAFusion.apply(x, W, a, b, p), a, b, mask)


def ours(name: str, fused: bool = False):
    """lora_linear by one of our backends; ``fused`` has base and update in one kernel, whatever was measured."""

    @contextmanager
    def context():
        with ExitStack() as stack:
            stack.enter_context(backend(name))
            if fused:
                stack.enter_context(patch("llmbuilder.ops._paths.fused", lambda *_: True))
            yield

    def make(stage, W, p):
        a, b = _adapters(stage, W)

        def mask(shape):
            with context():
                return ops.dropout(torch.ones(shape, device=W.device), p)

        return Layer(lambda x: ops.lora_linear(x, W, None, a, b, SCALING, p), a, b, mask, context)

    return make


COMPETITORS = {
    "frozen": frozen,
    "peft": peft,
    "unsloth-style": unsloth_style,
    "LoRAFusion-style": lorafusion_style,
    "llmbuilder (cuda)": ours("cuda"),
    "llmbuilder (triton)": ours("triton"),
    "llmbuilder (cuda, fused)": ours("cuda", fused=True),
}


def competitors(stage: Stage, p: float) -> dict[str, Callable]:
    """Those that can run here with this p."""
    missing = {"unsloth-style"} if p else set()
    missing |= {f"llmbuilder ({name})" for name in ("cuda", "triton") if name not in stage.backends()}
    return {name: make for name, make in COMPETITORS.items() if name not in missing}


def _adapters(stage, W):
    N, K = W.shape
    return (stage.randn(*shape, dtype=W.dtype).requires_grad_() for shape in ((R, K), (N, R)))


def _torch_mask(stage, dtype, p):
    return lambda shape: nn.functional.dropout(torch.ones(shape, dtype=dtype, device=stage.device), p)
