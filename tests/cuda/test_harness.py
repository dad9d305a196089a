"""What the fixtures here promise: kernels keep to the tensors that they are given, which are full of NaN at first."""

import pytest
import torch
from gpusim.harness import DEVICE, STREAM
from gpusim.record import KERNELS, LauncherError

from llmbuilder.ops import _cuda

SEED = torch.tensor(7)


def dropout(x, y, rows, columns):
    kernels = _cuda._kernels
    kernels.dropout(kernels.DType.f32, x.data_ptr(), y.data_ptr(), rows, columns, (SEED.data_ptr(), 0, 100), 0, 0)


@pytest.mark.parametrize("short", ["read", "written"])
def test_a_kernel_may_not_go_beyond_a_tensor(cuda, short):
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    x, y = (x[:3], y) if short == "read" else (x, y[:3])
    bound = r"float32\[3, 8\], which has 1 rows of 96 bytes"
    with pytest.raises(RuntimeError, match=f"dropout_kernel: launch: out of bounds: .* byte 96 of {bound}"):
        dropout(x, y, 4, 8)


def test_a_kernel_may_not_go_where_an_earlier_one_was_allowed(cuda):
    x, y = torch.randn(4, 8), torch.randn(4, 8)
    dropout(x, y, 4, 8)
    address = y.storage_offset() + torch.Tensor.untyped_storage(y).data_ptr()
    kernels = _cuda._kernels
    with pytest.raises(RuntimeError, match="out of bounds"):
        kernels.dropout(kernels.DType.f32, x.data_ptr(), address, 4, 8, (SEED.data_ptr(), 0, 100), 0, 0)


def test_columns_between_the_rows_of_a_slice_belong_to_nobody(cuda):
    logits = torch.randn(3, 24)[:, :16]
    kernels = _cuda._kernels
    targets, losses, predictions = torch.zeros(3, dtype=torch.int64), torch.empty(3), torch.empty(3, dtype=torch.int64)
    matrix = (logits.data_ptr(), 3, 20, 24)  # four columns too many
    outputs = losses.data_ptr(), predictions.data_ptr()
    with pytest.raises(RuntimeError, match="which has 3 rows of 64 bytes, 96 apart"):
        kernels.softmax_cross_entropy(kernels.DType.f32, matrix, targets.data_ptr(), 0, 0.0, False, *outputs, 0, 0)


def test_what_kernels_fill_is_nan_before(cuda):
    assert torch.empty(5, 5).isnan().all() and torch.randn(2).new_empty(9, dtype=torch.bfloat16).isnan().all()
    assert torch.empty_like(torch.zeros(7, dtype=torch.float64)).isnan().all()


def test_traffic_is_known_by_name(cuda):
    x = torch.randn(9, 16)
    with cuda.recording(x=x) as launches:
        _cuda.dropout(x, 100, SEED, 0)
    (launch,) = launches
    assert launch.kernel == "dropout_kernel" and launch.traffic["x"].unique_read == x.nbytes
    assert launch.traffic["float32[9, 16]"].unique_written == x.nbytes


WAITS = {
    "item": lambda y: y.sum().item(),
    "__bool__": lambda y: 1 if y.any() else 0,
    "__float__": lambda y: float(y[0, 0]),
    "tolist": lambda y: y.tolist(),
    "equal": lambda y: torch.equal(y, y),
    "tensor": lambda y: y + torch.tensor(1.0),
}


@pytest.mark.parametrize("name", WAITS)
def test_nobody_waits_for_a_result_in_a_capture(cuda, name):
    x = torch.randn(9, 16)
    with cuda.capturing():
        y = _cuda.dropout(x, 100, SEED, 0)
        with pytest.raises(RuntimeError, match=f"{name} while a stream is captured"):
            WAITS[name](y)
    WAITS[name](y)


def test_a_launcher_that_does_wrong_ends_the_test(cuda, monkeypatch):
    monkeypatch.setitem(KERNELS, "dropout", "two_kernels")
    with pytest.raises(LauncherError, match="dropout launches dropout"):
        _cuda.dropout(torch.randn(4, 8), 100, SEED, 0)


def test_launches_go_to_a_stream_of_another_gpu(cuda):
    _cuda.dropout(torch.randn(4, 8), 100, SEED, 0)
    (launch,) = cuda.recorder.launches()
    assert (launch.name, launch.device, launch.stream) == ("dropout", DEVICE, STREAM)
    assert DEVICE != cuda.recorder.device() == 0 != STREAM
