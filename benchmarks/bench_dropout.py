"""Dropout forward + backward against torch.nn.functional.dropout; floor: 10 times as fast at 2048 x 2560.

A further competitor is one entry in COMPETITORS: f(x, p) -> y, differentiable.
"""

import statistics

import torch
from harness import interleaved, median_ratio, relative, write
from torch.nn import functional

from llmbuilder import ops

P = 0.1
SHAPES = ((2048, 768), (2048, 2560), (2048, 4096))
COMPETITORS = {"torch": lambda x, p: functional.dropout(x, p), "llmbuilder": lambda x, p: ops.dropout(x, p)}


def check(name, f, dtype):
    """Rate, values, the same mask in both directions, another mask at the next call."""
    x = torch.randn(512, 1024).abs().add(0.5).to(dtype).requires_grad_()
    y = f(x, P)
    y.backward(torch.ones_like(y))
    kept = y != 0
    assert abs(kept.float().mean().item() - (1 - P)) < 0.005, name
    assert torch.equal(kept, x.grad != 0), f"{name}: forward and backward masks differ"
    bound = 1e-4 if dtype == torch.float32 else 1e-2
    assert relative(y[kept], x[kept] / (1 - P)) < bound, name
    assert relative(x.grad[kept], torch.full_like(x.grad[kept], 1 / (1 - P))) < bound, name
    assert not torch.equal(kept, f(x, P) != 0), f"{name}: the mask repeats"


def main():
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for name, f in COMPETITORS.items():
            check(name, f, dtype)
        for shape in SHAPES:
            x = torch.randn(shape).to(dtype).requires_grad_()
            grad = torch.randn(shape).to(dtype)

            def step(f, x=x, grad=grad):
                x.grad = None
                f(x, P).backward(grad)

            calls = {**COMPETITORS, "copy": lambda x, p: x.clone()}  # allocate and copy: the floor of any dropout
            times = interleaved({name: (lambda f=f: step(f)) for name, f in calls.items()}, repeats=15)
            for name, t in times.items():
                rows.append(
                    {
                        "dtype": str(dtype)[6:],
                        "shape": f"{shape[0]}x{shape[1]}",
                        "name": name,
                        "ms": f"{statistics.median(t) * 1e3:.3f}",
                        "torch / it": f"{median_ratio(times['torch'], t):.2f}",
                    }
                )
    write("dropout", rows)


if __name__ == "__main__":
    main()
