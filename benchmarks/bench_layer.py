"""One LoRA linear layer, forward + backward: overhead over the frozen layer, against PEFT; floor: a third of PEFT's.

Overhead = (t - t_frozen) / t_frozen, the same frozen layer for all: the fastest at hand (torch's own, or the path
that `ops.frozen_linear` found). Gradients are compared with fp64 first, with each competitor's own mask exported. A
further competitor is one function (linear, p) -> Layer in COMPETITORS.
"""

import statistics
import typing
from functools import partial

import torch
from harness import interleaved, relative, write
from torch import nn

from llmbuilder import ops
from llmbuilder.ops.dropout import seed_like

R, ALPHA, P, ROWS = 16, 32, 0.1, 2048
SIZES = (768, 2048, 4096)


class Layer(typing.NamedTuple):
    call: typing.Callable  # x -> y
    a: torch.Tensor  # [r, K]
    b: torch.Tensor  # [N, r]
    mask: typing.Callable  # shape -> keep / (1 - p) that a call would draw now, torch's generator in the same state


def peft_layer(linear, p):
    import peft

    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=p, target_modules=["0"])
    layer = peft.get_peft_model(nn.Sequential(linear), config).base_model.model[0]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    return Layer(layer, a, b, lambda shape: nn.functional.dropout(torch.ones(shape), p))


def llmbuilder_layer(linear, p):
    from llmbuilder.nn import LoRAConfig, add_lora

    model = nn.Sequential(linear)
    add_lora(model, LoRAConfig(rank=R, alpha=ALPHA, dropout=p, target_modules=["0"]))
    a, b = (q for q in model.parameters() if q.requires_grad)

    def mask(shape):
        seed = seed_like(torch.empty(1))
        return ops.dropout(torch.ones(shape), p, seed)

    return Layer(model[0], a, b, mask)


COMPETITORS = {"peft": peft_layer, "llmbuilder": llmbuilder_layer}


def linear(n, dtype):
    layer = nn.Linear(n, n, bias=False).to(dtype).requires_grad_(False)
    nn.init.normal_(layer.weight, std=n**-0.5)
    return layer


def build(make, base, p):
    layer = make(base, p)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        layer.a.copy_(torch.randn(layer.a.shape, generator=generator) * base.in_features**-0.5)
        layer.b.copy_(torch.randn(layer.b.shape, generator=generator) * 0.05)
    layer.call.train()
    return layer


def check(name, make, n, dtype, m=192):
    """y, dX, dA, dB against fp64 with the exported mask; relative errors in the Frobenius norm."""
    base = linear(n, dtype)
    layer = build(make, base, P)
    x, dy = torch.randn(m, n).to(dtype).requires_grad_(), torch.randn(m, n).to(dtype)
    torch.manual_seed(11)
    scale = layer.mask((m, n)).double()
    torch.manual_seed(11)
    y = layer.call(x)
    y.backward(dy)
    x64, a64, b64 = (t.detach().double().requires_grad_() for t in (x, layer.a, layer.b))
    want = x64 @ base.weight.double().t() + ALPHA / R * ((x64 * scale) @ a64.t() @ b64.t())
    want.backward(dy.double())
    pairs = ((y, want), (x.grad, x64.grad), (layer.a.grad, a64.grad), (layer.b.grad, b64.grad))
    errors = [relative(*pair) for pair in pairs]
    assert max(errors) < (3e-6 if dtype == torch.float32 else 1e-2), f"{name} {n} {dtype}: {errors}"


def step(call, x, dy, parameters):
    x.grad = None
    for q in parameters:
        q.grad = None
    call(x).backward(dy)


def measure(n, dtype):
    """Rows of one shape and dtype: milliseconds and overhead over the faster of the two frozen layers."""
    base = linear(n, dtype)
    x, dy = torch.randn(ROWS, n).to(dtype).requires_grad_(), torch.randn(ROWS, n).to(dtype)
    run = {
        "frozen (torch)": partial(step, base, x, dy, ()),
        "frozen": partial(step, partial(ops.frozen_linear, weight=base.weight), x, dy, ()),
    }
    for name, make in COMPETITORS.items():
        layer = build(make, linear(n, dtype), P)
        run[name] = partial(step, layer.call, x, dy, (layer.a, layer.b))
    times = interleaved(run, repeats=15, inner=max(1, int(1e10 / (ROWS * n * n))))
    frozen = min((times[k] for k in run if k.startswith("frozen")), key=statistics.median)
    overhead = {name: statistics.median(t / f - 1 for t, f in zip(times[name], frozen, strict=True)) for name in run}
    return [
        {
            "dtype": str(dtype)[6:],
            "shape": f"{n}x{n}",
            "name": name,
            "ms": f"{statistics.median(times[name]) * 1e3:.2f}",
            "overhead": f"{overhead[name]:.3f}",
            "of peft's": f"{overhead[name] / overhead['peft']:.2f}",
        }
        for name in run
    ]


def main():
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for n in SIZES:
            for name, make in COMPETITORS.items():
                check(name, make, n, dtype)
            rows += measure(n, dtype)
    write("layer", rows)


if __name__ == "__main__":
    main()
