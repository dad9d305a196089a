"""EWC penalty, value and gradient, over the parameters of a 110 M model; floor: 4 times as fast as the loop.

The baselines are written after the two usual forms: a loop over the parameters that builds the penalty with autograd
(as Avalanche's plugin does) and one flat vector of all parameters (as mammoth does). Each adds its gradient to `.grad`,
which exists already. A further competitor is one entry in COMPETITORS: f(params, anchors, fishers, strength) -> value.
"""

import resource
import statistics

import torch
from harness import interleaved, median_ratio, relative, write

from llmbuilder import ops


def loop(params, anchors, fishers, strength):
    penalty = torch.zeros(())
    for p, q, f in zip(params, anchors, fishers, strict=True):
        penalty = penalty + (f * (p - q).pow(2)).sum()
    loss = 0.5 * strength * penalty
    loss.backward()
    return loss.item()


class Flat:
    """One flat vector; anchors and Fisher are flattened once."""

    def __init__(self):
        self.of = None

    def __call__(self, params, anchors, fishers, strength):
        if self.of is not anchors:
            self.of = anchors
            self.anchor = torch.cat([q.view(-1) for q in anchors])
            self.fisher = torch.cat([f.view(-1) for f in fishers])
        theta = torch.cat([p.view(-1) for p in params])
        loss = 0.5 * strength * (self.fisher * (theta - self.anchor) ** 2).sum()
        loss.backward()
        return loss.item()


COMPETITORS = {"loop": loop, "flat vector": Flat(), "llmbuilder": ops.ewc_penalty_}


def shapes(hidden, layers, inner, vocabulary):
    layer = [(hidden, hidden)] * 4 + [(inner, hidden)] * 2 + [(hidden, inner)] + [(hidden,)] * 2
    return [(vocabulary, hidden), *layer * layers, (hidden,)]


def tensors(sizes):
    params = [torch.randn(s).mul_(0.02).requires_grad_() for s in sizes]
    for p in params:
        p.grad = torch.zeros_like(p)
    return params, [p.detach() + 0.01 * torch.randn_like(p) for p in params], [torch.rand_like(p) for p in params]


def check(name, f):
    torch.manual_seed(1)
    params, anchors, fishers = tensors([*shapes(64, 2, 96, 1001), (7,), (129,)])
    grads = [torch.randn_like(p) for p in params]
    for p, g in zip(params, grads, strict=True):
        p.grad.copy_(g)
    value = f(params, anchors, fishers, 3.0)
    want = 0.0
    for p, q, w, g in zip(params, anchors, fishers, grads, strict=True):
        drift = p.detach().double() - q.double()
        want += 1.5 * (w.double() * drift**2).sum().item()
        assert relative(p.grad, g.double() + 3.0 * w.double() * drift) < 1e-6, name
    assert abs(value - want) < 1e-5 * abs(want), (name, value, want)


def extra_memory(f, *arguments):
    """Growth of the peak resident set by one call, in MB. Called before anything larger has run in the process."""
    peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024  # noqa: E731
    before = peak()
    f(*arguments)
    return peak() - before


def main():
    for name, f in COMPETITORS.items():
        check(name, f)
    params, anchors, fishers = tensors(shapes(768, 12, 2048, 32000))
    arguments = (params, anchors, fishers, 1e-3)
    ours = extra_memory(COMPETITORS["llmbuilder"], *arguments)
    assert ours < 8, f"the fused penalty took {ours:.0f} MB beyond the gradient"
    n = sum(p.numel() for p in params)
    run = {name: (lambda f=f: f(*arguments)) for name, f in COMPETITORS.items()}
    times = interleaved(run, repeats=9)
    # the memory floor: five streams (read theta, anchor, Fisher and gradient, write the gradient) at a.add_(b)'s speed
    a, b = torch.zeros(n), torch.ones(n)
    add = statistics.median(interleaved({"add_": lambda: a.add_(b)}, repeats=9)["add_"])
    floor = add * 5 / 3
    rows = [
        {
            "name": name,
            "parameters": n,
            "ms": f"{statistics.median(t) * 1e3:.2f}",
            "loop / it": f"{median_ratio(times['loop'], t):.2f}",
            "share of bandwidth": f"{floor / statistics.median(t):.2f}",
            "extra MB": f"{ours:.1f}" if name == "llmbuilder" else "",
        }
        for name, t in times.items()
    ]
    write("ewc", rows)


if __name__ == "__main__":
    main()
