"""Runs every operator of a backend once on shapes with tails: what compute-sanitizer watches.

python benchmarks/gpu/exercise.py cuda|triton [cpu]
"""

import torch

from llmbuilder import ops


def exercise(device: str) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for M, N, K, r in ((70, 56, 88, 8), (33, 41, 63, 40)):
            x = torch.randn(M, K, device=device).to(dtype).requires_grad_()
            W, bias = torch.randn(N, K, device=device).to(dtype), torch.randn(N, device=device).to(dtype)
            a, b = (torch.randn(*s, device=device).to(dtype).requires_grad_() for s in ((r, K), (N, r)))
            for p in (0.0, 0.3):
                ops.lora_linear(x, W, bias, a, b, 2.0, p).sum().backward()
                ops.dropout(x.detach(), 0.3)
        parameters = [torch.randn(size, device=device).to(dtype).requires_grad_() for size in (1000, 3, 17)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter)
        anchors = [torch.zeros_like(parameter) for parameter in parameters]
        fishers = [torch.ones_like(parameter) for parameter in parameters]
        ops.ewc_penalty_(parameters, anchors, fishers, 1.0)
        ops.ewc_accumulate_(fishers, [parameter.grad for parameter in parameters], 1.0)
        hidden = torch.randn(20, 24, device=device).to(dtype).requires_grad_()
        head = torch.randn(100, 24, device=device).to(dtype).requires_grad_()
        ops.linear_cross_entropy(hidden, head, torch.arange(20, device=device)).backward()


if __name__ == "__main__":
    exercise("cuda")
