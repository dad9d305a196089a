"""What nvcc makes of csrc/cuda for sm_80, interpreted on small shapes: right by the rule for errors, none refused."""

import pytest
import torch
from codegen import nvcc
from ptx.operators import Case, draw

from llmbuilder.ops import _cuda, reference

pytestmark = pytest.mark.skipif(not nvcc.nvcc(), reason="no nvcc here: the CUDA kernels' PTX can't be made")
BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32

# Tails in every dimension, ranks of several tiles, one and two passes, aligned and not.
CASES = [
    Case("dropout", BF16, M=7, K=83, threshold=6554),
    Case("dropout", F32, M=5, K=64, threshold=30000),
    Case("lora_shrink", BF16, M=37, K=96, r=8, threshold=6554),
    Case("lora_shrink", F16, M=18, K=71, r=40, sliced=True),
    Case("lora_shrink", F32, M=17, K=40, r=5, threshold=6554),
    Case("lora_shrink", F32, M=20, K=72, r=16, tf32=True),
    Case("lora_expand", BF16, M=37, N=72, r=8),
    Case("lora_expand", F16, M=18, N=63, r=40, sliced=True),
    Case("lora_expand", F32, M=9, N=24, r=5),
    Case("lora_grad_sb", BF16, M=37, N=72, r=8),
    Case("lora_grad_sb", F16, M=33, N=63, r=40, sliced=True),
    Case("lora_grad_sb", F32, M=17, N=24, r=5),
    Case("lora_grad_ax", BF16, M=37, K=96, r=8, threshold=6554),
    Case("lora_grad_ax", F16, M=33, K=71, r=40, sliced=True, threshold=6554),
    Case("lora_grad_ax", F32, M=17, K=40, r=5, threshold=6554),
    Case("lora_fused", BF16, M=37, N=72, K=96, r=8),
    Case("lora_fused", F16, M=18, N=63, K=71, r=40, sliced=True),
    Case("lora_fused", F32, M=20, N=24, K=40, r=8, tf32=True),
    Case("lora_fused_grad", BF16, M=37, N=72, K=96, r=8, threshold=6554),
    Case("lora_fused_grad", F32, M=18, N=31, K=41, r=5, threshold=6554, sliced=True),
]


@pytest.fixture(scope="module")
def gpu():
    from ptx.device import device

    return device()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator(case, gpu, check_error, monkeypatch):
    drawn = draw(case)
    if case.tf32:
        monkeypatch.setattr(_cuda, "allows_tf32", lambda: True)
    with gpu.interpreting(seed=int(torch.randint(1, 1000, ()))) as run:
        out = drawn.call(_cuda)
    assert run.launches
    for name, *values in zip(("first", "second"), out, drawn.plain, drawn.exact, strict=False):
        check_error(*values, name=name, dtype=case.dtype)


def test_one_mask_for_forward_and_backward(gpu):
    x = torch.ones(9, 77)
    seed = torch.tensor(1 << 50)
    with gpu.interpreting():
        keep = _cuda.dropout_mask(x.shape, 20000, seed, 2)
        y = _cuda.dropout(x, 20000, seed, 2)
    assert torch.equal(y != 0, keep) and torch.equal(y, reference.dropout(x, 20000, seed, 2))


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_ewc(gpu, dtype):
    parameters = [torch.randn(size).to(dtype).requires_grad_() for size in (700, 3, 64)]
    anchors, fishers = ([torch.rand(p.shape).to(dtype) for p in parameters] for _ in range(2))
    before = [torch.randn_like(p) for p in parameters]
    for parameter, grad in zip(parameters, before, strict=True):
        parameter.grad = grad.clone()
    with gpu.interpreting(seed=5) as run:
        value = _cuda.ewc_penalty_(parameters, anchors, fishers, 3.0)
    assert len(run.launches) == 2
    differences = [p.detach().double() - a.double() for p, a in zip(parameters, anchors, strict=True)]
    expected = sum((1.5 * f.double() * d**2).sum() for f, d in zip(fishers, differences, strict=True))
    assert abs(value.item() - expected.item()) <= 1e-5 * expected.item()
    for parameter, grad, fisher, difference in zip(parameters, before, fishers, differences, strict=True):
        exact = grad.double() + 3 * fisher.double() * difference
        assert (parameter.grad.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [BF16, F32])
def test_cross_entropy(gpu, dtype):
    logits, targets = torch.randn(3, 77).to(dtype) * 3, torch.tensor([76, 0, 5])
    grad = logits.clone()
    with gpu.interpreting(seed=5):
        losses, predictions = _cuda.softmax_cross_entropy_(grad, targets, None, 0.0, True)
    exact = torch.nn.functional.cross_entropy(logits.double(), targets, reduction="none")
    assert (losses - exact).abs().max() < 1e-5 and torch.equal(predictions, logits.argmax(1))
    expected = logits.double().softmax(1) - torch.nn.functional.one_hot(targets, 77)
    assert (grad.double() - expected).abs().max() <= torch.finfo(dtype).eps
