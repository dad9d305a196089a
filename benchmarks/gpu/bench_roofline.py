"""Every LoRA operator by shape and rank: its time, and the least that this GPU's memory and tensor cores allow.

The roof is measured in the same run: a copy for bytes a second, the library's product for operations a second. Bytes
are those of docs/kernels.md's table, operations those of the padded products. Where `lora_fused` is faster than the
library's path, its row is one for `_paths.FUSED`.
"""

import torch
from stage import Stage, backend

from llmbuilder.ops import _backend

NAME = "roofline"


def rows(stage: Stage):
    sizes = stage.pick((4096, 8192, 14336), (64,))
    ranks = stage.pick((8, 16, 32, 64, 128), (8, 40))
    tokens = stage.pick(8192, 32)
    for n in sizes:
        peak = peaks(stage, n, tokens)
        for r in ranks:
            for name in stage.backends():
                with backend(name):
                    check_fused(stage, name, r)
                    yield from measure(stage, name, n, tokens, r, peak)


def peaks(stage, n, tokens):
    """Bytes and operations a second of a copy and a product of this size."""
    x, W = stage.randn(tokens, n, dtype=torch.bfloat16), stage.randn(n, n, dtype=torch.bfloat16)
    y = torch.empty_like(x)
    seconds = stage.medians({"copy": lambda: y.copy_(x), "product": lambda: torch.mm(x, W, out=y)})
    return 2 * x.nbytes / seconds["copy"], 2 * tokens * n * n / seconds["product"]


def check_fused(stage, name, r, n=256, tokens=96):
    """lora_fused against fp64, by the error of the library's path. The other operators: bench_layer.py."""
    x, W, S, B = (stage.randn(*s, dtype=torch.bfloat16) for s in ((tokens, n), (n, n), (tokens, r), (n, r)))
    fused = _backend.serve("lora_fused", x)(x, W, None, S, B, 2.0)
    plain = (2.0 * S @ B.t()).addmm_(x, W.t())
    exact = 2.0 * S.double() @ B.double().t() + x.double() @ W.double().t()
    error, allowed = ((y.double() - exact).abs().max().item() for y in (fused, plain))
    if not error <= 2 * allowed + torch.finfo(x.dtype).eps * exact.abs().max().item():
        raise SystemExit(f"lora_fused by {name}, r={r}, is off by {error:.2e}, the library's path by {allowed:.2e}")


def measure(stage, name, n, tokens, r, peak):
    bf16 = torch.bfloat16
    x, dY = stage.randn(tokens, n, dtype=bf16), stage.randn(tokens, n, dtype=bf16)
    W, A, B = (stage.randn(*shape, dtype=bf16) * n**-0.5 for shape in ((n, n), (r, n), (n, r)))
    S = stage.randn(tokens, r, dtype=bf16)
    seed, threshold = torch.tensor(5, device=stage.device), 6554  # p = 0.1
    get = {operator: _backend.serve(operator, x) for operator in OPERATORS}

    def library():
        get["lora_expand"](S, B, None, 2.0).addmm_(x, W.t())

    run = {
        "lora_shrink": lambda: get["lora_shrink"](x, A, threshold, seed, 0),
        "lora_expand": lambda: get["lora_expand"](S, B, None, 2.0),
        "lora_grad_sb": lambda: get["lora_grad_sb"](dY, S, B, 2.0),
        "lora_grad_ax": lambda: get["lora_grad_ax"](x, S, A, threshold, seed, 0, True),
        "lora_fused": lambda: get["lora_fused"](x, W, None, S, B, 2.0),
        "library path": library,
    }
    seconds = stage.medians(run)
    U, small, products = tokens * n * 2, tokens * r * 2 + n * r * 2, 2 * tokens * n * (-(-r // 16) * 16)
    passes = 1 if r <= 32 else 2
    bytes_of = {
        "lora_shrink": U + small,
        "lora_expand": U + small,
        "lora_grad_sb": passes * U + 2 * small,
        "lora_grad_ax": 2 * U + 2 * small,
        "lora_fused": 2 * U + n * n * 2 + small,
        "library path": 4 * U + n * n * 2 + small,
    }
    base = 2 * tokens * n * n
    operations = {
        "lora_shrink": products,
        "lora_expand": products,
        "lora_grad_sb": 2 * products,
        "lora_grad_ax": 2 * products,
        "lora_fused": base + products,
        "library path": base + products,
    }
    for operator, took in seconds.items():
        least = max(bytes_of[operator] / peak[0], operations[operator] / peak[1])
        yield {
            "backend": name,
            "operator": operator,
            "tokens": tokens,
            "shape": f"{n}x{n}",
            "r": r,
            "ms": f"{took * 1e3:.4f}",
            "roof ms": f"{least * 1e3:.4f}",
            "of roof": f"{least / took:.3f}",
            "bound by": "memory" if bytes_of[operator] / peak[0] > operations[operator] / peak[1] else "products",
        }


OPERATORS = ("lora_shrink", "lora_expand", "lora_grad_sb", "lora_grad_ax", "lora_fused")
