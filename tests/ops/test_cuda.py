"""The backend `cuda` beside its kernels: torch's settings and streams. tests/cuda has the kernels."""

from types import SimpleNamespace

import pytest
import torch

from llmbuilder.ops import _cuda, _paths


@pytest.fixture
def matmul():
    """torch's settings of products, put back afterwards."""
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield matmul
    matmul.fp32_precision = before


def test_tf32_follows_torchs_setting(matmul):
    assert not _cuda.allows_tf32()
    for precision, allowed in (("tf32", True), ("ieee", False)):
        matmul.fp32_precision = precision
        assert _cuda.allows_tf32() == allowed


def test_tf32_follows_torchs_older_settings_too(matmul):
    try:
        for name, allowed in (("high", True), ("highest", False)):
            torch.set_float32_matmul_precision(name)
            assert _cuda.allows_tf32() == allowed
        matmul.allow_tf32 = True
        assert _cuda.allows_tf32()
    finally:
        torch.set_float32_matmul_precision("highest")


def test_work_goes_to_torchs_current_stream_of_the_tensors_gpu(monkeypatch):
    streams = {torch.device("cuda", 0): 11, torch.device("cuda", 1): 22}
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=streams[device]))
    assert _cuda._at(SimpleNamespace(device=torch.device("cuda", 1))) == (1, 22)


@pytest.mark.parametrize(
    "device, rows, shape, rank, expected",
    [
        ("Some GPU", 512, (96, 64), 16, True),
        ("Some GPU", 511, (96, 64), 16, False),
        ("Some GPU", 512, (64, 96), 16, False),
        ("Some GPU", 512, (96, 64), 8, False),
        ("Another GPU", 512, (96, 64), 16, False),
    ],
)
def test_the_fused_product_serves_what_was_measured_and_nothing_else(monkeypatch, device, rows, shape, rank, expected):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: device)
    x = SimpleNamespace(device=torch.device("cuda", 0), dtype=torch.bfloat16, shape=(rows, shape[1]))
    weight = SimpleNamespace(shape=shape)
    assert not _paths.fused(x, weight, rank)
    monkeypatch.setattr(_paths, "FUSED", (_paths.Measured("Some GPU", torch.bfloat16, 96, 64, 16, 512),))
    assert _paths.fused(x, weight, rank) == expected
    assert _paths.where() == "Some GPU: 96 x 64, rank 16, from 512 rows on"
