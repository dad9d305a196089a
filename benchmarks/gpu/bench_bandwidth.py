"""Dropout and EWC against a copy: bytes of their tables of traffic a second, as a part of what copying reaches."""

import torch
from stage import Stage, backend

from llmbuilder import ops

NAME = "bandwidth"


def rows(stage: Stage):
    shape = stage.pick((8192, 8192), (16, 64))
    for dtype in (torch.float32, torch.bfloat16):
        yield from dropout(stage, shape, dtype)
    sizes = stage.pick([14336 * 4096] * 4 + [4096] * 64, [999, 64, 1])
    for dtype in (torch.float32, torch.bfloat16):
        yield from ewc(stage, sizes, dtype)


def dropout(stage, shape, dtype):
    x = stage.randn(*shape, dtype=dtype)
    y = torch.empty_like(x)
    seed = torch.tensor(11, device=stage.device)
    run = {"copy": lambda: y.copy_(x), "torch": lambda: torch.native_dropout(x, 0.1, True)}
    moved = dict.fromkeys(run, 2 * x.nbytes) | {"torch": 2 * x.nbytes + x.numel()}
    for name in stage.backends():
        run[f"llmbuilder ({name})"] = _forced(name, lambda: ops.dropout(x, 0.1, seed))
        moved[f"llmbuilder ({name})"] = 2 * x.nbytes
    with backend("reference"):
        expected = ops.dropout(x, 0.1, seed)
    for name in stage.backends():
        if not torch.equal(run[f"llmbuilder ({name})"](), expected):
            raise SystemExit(f"dropout by {name} differs from the reference")
    yield from _rates(stage, "dropout", f"{shape[0]}x{shape[1]}", dtype, run, moved)


def ewc(stage, sizes, dtype):
    def tensors():
        return [stage.randn(size, dtype=dtype) for size in sizes]

    parameters, anchors, fishers = tensors(), tensors(), [f.abs() for f in tensors()]
    for parameter in parameters:
        parameter.requires_grad_().grad = torch.zeros_like(parameter)
    one = stage.randn(sum(sizes), dtype=dtype)
    other = torch.empty_like(one)

    def loop():
        """The penalty as an eager loop over the tensors, with its gradient."""
        total = 0
        for theta, anchor, fisher in zip(parameters, anchors, fishers, strict=True):
            total = total + (fisher * (theta - anchor) ** 2).sum()
        (0.5 * total).backward()
        return 0.5 * total.item()

    run = {"copy": lambda: other.copy_(one), "loop": loop}
    moved = {"copy": 2 * one.nbytes, "loop": 5 * one.nbytes}
    for name in stage.backends():
        run[f"llmbuilder ({name})"] = _forced(name, lambda: ops.ewc_penalty_(parameters, anchors, fishers, 1.0))
        moved[f"llmbuilder ({name})"] = 5 * one.nbytes
    wanted = sum(
        (f.double() * (p.detach().double() - a.double()) ** 2).sum().item() / 2
        for p, a, f in zip(parameters, anchors, fishers, strict=True)
    )
    for name in stage.backends():
        value = float(run[f"llmbuilder ({name})"]())
        if abs(value - wanted) > 1e-5 * wanted:
            raise SystemExit(f"the EWC penalty by {name} is {value}, expected {wanted}")
    yield from _rates(stage, "ewc", f"{sum(sizes)} in {len(sizes)} tensors", dtype, run, moved)


def _forced(name, function):
    def call():
        with backend(name):
            return function()

    return call


def _rates(stage, operator, shape, dtype, run, moved):
    seconds = stage.medians(run)
    rates = {name: moved[name] / seconds[name] / 1e9 for name in run}
    for name in run:
        yield {
            "operator": operator,
            "shape": shape,
            "dtype": str(dtype)[6:],
            "name": name,
            "ms": f"{seconds[name] * 1e3:.4f}",
            "GB/s": f"{rates[name]:.0f}",
            "of copy": f"{rates[name] / rates['copy']:.3f}",
        }
