"""A LoRA layer's step captured in a CUDA graph: the replay gives the eager step's bits, and its time beside eager's.

The seed is passed in, as under a graph it must be: another value in the same tensor gives another mask.
"""

import torch
from layers import SCALING, R
from stage import Stage, backend

from llmbuilder import ops

NAME = "graph"


def rows(stage: Stage):
    n, tokens = stage.pick((4096, 4096), (64, 32))
    for name in stage.backends():
        with backend(name):
            yield measure(stage, name, n, tokens)


def measure(stage, name, n, tokens):
    bf16 = torch.bfloat16
    W = stage.randn(n, n, dtype=bf16) * n**-0.5
    x, dY = stage.randn(tokens, n, dtype=bf16, grad=True), stage.randn(tokens, n, dtype=bf16)
    a, b = stage.randn(R, n, dtype=bf16, grad=True), stage.randn(n, R, dtype=bf16, grad=True)
    seed = torch.tensor(3, device=stage.device)
    leaves = (x, a, b)

    def step():
        y = ops.lora_linear(x, W, None, a, b, SCALING, 0.1, seed)
        return [y, *torch.autograd.grad(y, leaves, dY)]

    kept = [torch.empty_like(t) for t in step()]

    def into_kept():
        for target, value in zip(kept, step(), strict=True):
            target.copy_(value.detach())

    replay = stage.captured(into_kept)
    for value in (3, 4):
        seed.fill_(value)
        eager = step()
        replay()
        if not all(torch.equal(k, e) for k, e in zip(kept, eager, strict=True)):
            raise SystemExit(f"the graph of {name} gives other bits than the eager step")
    seconds = stage.medians({"eager": into_kept, "replay": replay})
    return {
        "backend": name,
        "tokens": tokens,
        "shape": f"{n}x{n}",
        "r": R,
        "eager ms": f"{seconds['eager'] * 1e3:.4f}",
        "replay ms": f"{seconds['replay'] * 1e3:.4f}",
    }
