"""The frozen product: right for every dtype and layout, and oneDNN only where it is truly fp32."""

import pytest
import torch
from torch.nn import functional as F

from llmbuilder.ops import _gemm

SHAPES = [(1, 1, 1), (1, 768, 300), (0, 64, 32), (3, 0, 4), (5, 7, 0), (33, 513, 65), (200, 96, 130)]


def worst_of_torch(x, weight, bias):
    """F.linear in the worse of torch's two fp32 precisions that stay fp32."""
    results = []
    before = torch.get_float32_matmul_precision()
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            results.append(F.linear(x, weight, bias))
    finally:
        torch.set_float32_matmul_precision(before)
    exact = F.linear(x.double(), weight.double(), None if bias is None else bias.double())
    return max(results, key=lambda y: float((y - exact).abs().max()) if y.numel() else 0.0), exact


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("M, K, N", SHAPES)
def test_product_and_its_gradient_are_as_good_as_torchs(M, K, N, dtype, check_error):
    x, weight, bias, dY = (torch.randn(*s).to(dtype) for s in ((M, K), (N, K), (N,), (M, N)))
    for b in (None, bias):
        check_error(_gemm.linear(x, weight, b), *worst_of_torch(x, weight, b))
    check_error(_gemm.linear_grad(dY, weight), *worst_of_torch(dY, weight.t(), None))


@pytest.mark.parametrize(
    "layout",
    {
        "transposed": lambda w: w.t().contiguous().t(),
        "rows of a fused weight": lambda w: torch.cat([w, w])[w.shape[0] :],
        "columns of a fused weight": lambda w: torch.cat([w, w], 1)[:, w.shape[1] :],
        "slice of a transposed one": lambda w: torch.cat([w, w]).t().contiguous()[:, w.shape[0] :].t(),
        "every other column": lambda w: w.repeat_interleave(2, 1)[:, ::2],
    }.items(),
    ids=lambda item: item[0],
)
def test_weights_of_any_layout(layout, check_error):
    x, weight, dY = torch.randn(80, 96), torch.randn(112, 96), torch.randn(80, 112)
    view = layout[1](weight)
    assert torch.equal(view, weight)
    check_error(_gemm.linear(x, view), *worst_of_torch(x, weight, None))
    check_error(_gemm.linear_grad(dY, view), *worst_of_torch(dY, weight.t(), None))


def test_equal_calls_give_equal_bits():
    x, weight = torch.randn(70, 200), torch.randn(90, 200)
    assert torch.equal(_gemm.linear(x, weight), _gemm.linear(x, weight))


def test_the_probe_refuses_a_product_that_rounds_to_bf16(monkeypatch):
    def rounded(x, weight, bias, *_):
        return F.linear(x.bfloat16(), weight.bfloat16()).float()

    def missing(*_):
        raise NotImplementedError("no kernel for this processor")

    for product in (rounded, missing):
        monkeypatch.setattr(_gemm, "_onednn", product)
        assert not _gemm.onednn_is_precise.__wrapped__()


def test_without_onednn_torch_serves(monkeypatch):
    monkeypatch.setattr(_gemm, "onednn_is_precise", lambda: False)
    x, weight, bias = torch.randn(128, 128), torch.randn(128, 128), torch.randn(128)
    assert torch.equal(_gemm.linear(x, weight, bias), F.linear(x, weight, bias))


def test_no_process_wide_setting_changes():
    def settings():
        return (
            torch.get_float32_matmul_precision(),
            torch.backends.mkldnn.enabled,
            torch.backends.mkldnn.matmul.fp32_precision,
            torch.get_num_threads(),
            torch.get_default_dtype(),
        )

    before = settings()
    _gemm.onednn_is_precise.cache_clear()
    _gemm.linear(torch.randn(128, 128), torch.randn(128, 128))
    assert settings() == before
