"""One LoRA linear layer, forward + backward: overhead over the frozen layer, against PEFT and eager baselines.

Overhead = (t - t_frozen) / t_frozen. Before any figure y, dX, dA and dB of every competitor are compared with fp64,
with the mask that it drew: the error may be twice that of plain torch in the same dtype.
"""

import statistics
from functools import partial

import torch
from layers import COMPETITORS, SCALING, R, competitors
from stage import Stage

NAME = "layer"


def rows(stage: Stage):
    sizes = stage.pick((4096, 8192), (64,))
    for dtype in (torch.bfloat16, torch.float16):
        for p in (0.0, 0.1):
            for n in sizes:
                check(stage, n if stage.dry else 1024, dtype, p)
                yield from measure(stage, n, stage.pick(8192, 32), dtype, p)


def measure(stage, n, tokens, dtype, p):
    W = stage.randn(n, n, dtype=dtype) * n**-0.5
    x, dY = stage.randn(tokens, n, dtype=dtype, grad=True), stage.randn(tokens, n, dtype=dtype)
    layers = {name: make(stage, W, p) for name, make in competitors(stage, p).items()}
    times = stage.times({name: partial(layer.step, x, dY) for name, layer in layers.items()})
    overhead = {
        name: statistics.median(t / f - 1 for t, f in zip(each, times["frozen"], strict=True))
        for name, each in times.items()
    }
    for name, each in times.items():
        yield {
            "dtype": str(dtype)[6:],
            "tokens": tokens,
            "shape": f"{n}x{n}",
            "r": R,
            "p": p,
            "name": name,
            "ms": f"{statistics.median(each) * 1e3:.3f}",
            "overhead": f"{overhead[name]:.4f}",
            "of peft's": f"{overhead[name] / overhead['peft']:.3f}",
        }


def check(stage, n, dtype, p, tokens=96):
    """Every competitor against fp64, by the error of plain torch."""
    W = stage.randn(n, n, dtype=dtype) * n**-0.5
    x, dY = stage.randn(tokens, n, dtype=dtype), stage.randn(tokens, n, dtype=dtype)
    for name in competitors(stage, p):
        if name == "frozen":
            continue
        layer = COMPETITORS[name](stage, W, p)
        with torch.no_grad():
            layer.a.copy_(torch.randn(layer.a.shape) * n**-0.5)
            layer.b.copy_(torch.randn(layer.b.shape) * 0.05)
        torch.manual_seed(7)
        mask = layer.mask((tokens, n)) if p else torch.ones(tokens, n, device=stage.device)
        torch.manual_seed(7)
        leaf = x.clone().requires_grad_()
        got = [layer.step(leaf, dY).detach(), leaf.grad, layer.a.grad, layer.b.grad]
        exact, plain = (_plain(x, W, layer.a, layer.b, mask, dY, kind) for kind in (torch.float64, dtype))
        for what, *values in zip(("y", "dX", "dA", "dB"), got, plain, exact, strict=True):
            error, allowed = ((v.double() - values[2]).abs().max().item() for v in values[:2])
            last_place = torch.finfo(dtype).eps * values[2].abs().max().item()
            if not error <= 2 * allowed + last_place:
                raise SystemExit(f"{name}, {n}, {dtype}, p={p}: {what} is off by {error:.2e}, torch by {allowed:.2e}")


def _plain(x, W, a, b, mask, dY, dtype):
    """y, dX, dA, dB of the formula in torch."""
    x, a, b = (t.detach().to(dtype).requires_grad_() for t in (x, a, b))
    W, mask = W.to(dtype), mask.to(dtype)
    y = x @ W.t() + SCALING * ((x * mask) @ a.t() @ b.t())
    y.backward(dY.to(dtype))
    return y.detach(), x.grad, a.grad, b.grad
