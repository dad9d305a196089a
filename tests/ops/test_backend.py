"""Who serves what: the choice, the forced choice, and the words when it can't be had."""

import importlib

import pytest
import torch

from llmbuilder import ops
from llmbuilder.errors import LLMBuilderError
from llmbuilder.ops import _backend, reference


def test_each_operator_is_served_by_what_explain_names():
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        for row in _backend.explain("cpu", dtype):
            function = _backend.serve(row.operator, torch.empty(0, dtype=dtype))
            module = _backend.OPERATORS[row.operator][row.backend]
            assert function is getattr(importlib.import_module(f"llmbuilder.{module}"), row.operator)
            assert set(row.why_not) == set(_backend.BACKENDS) - {row.backend}
            assert all(row.why_not.values())


def test_fp64_goes_to_the_reference():
    assert {row.backend for row in _backend.explain("cpu", torch.float64)} == {"reference"}


def test_forcing_the_reference_takes_every_operator_from_the_kernels(monkeypatch):
    monkeypatch.setenv("LLMBUILDER_BACKEND", "reference")
    rows = _backend.explain()
    assert {row.backend for row in rows} == {"reference"}
    assert "LLMBUILDER_BACKEND=reference forces another" in rows[0].why_not["cpu"]
    assert _backend.serve("dropout", torch.empty(0)) is reference.dropout


@pytest.mark.parametrize(
    "forced, dtype, reason",
    [
        ("cpu", torch.float64, "no kernels for float64"),
        ("triton", torch.float32, "Triton's kernels run on a GPU, the tensor is on cpu"),
        ("cuda", torch.float32, "these kernels are not built"),
    ],
)
def test_a_forced_backend_that_cannot_serve_is_an_error(monkeypatch, forced, dtype, reason):
    monkeypatch.setenv("LLMBUILDER_BACKEND", forced)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(_backend._cuda, "_kernels", None)
    monkeypatch.setattr(_backend._native, "cuda_why_not", lambda: "these kernels are not built")
    with pytest.raises(LLMBuilderError, match=f"dropout: LLMBUILDER_BACKEND={forced} can't serve it: {reason}"):
        ops.dropout(torch.ones(3, dtype=dtype), 0.5)
    row = _backend.explain("cpu", dtype)[0]
    assert row.backend is None
    assert reason in row.why_not[forced]


def test_a_backend_that_lacks_an_operator_cannot_be_forced_on_it(monkeypatch):
    monkeypatch.setenv("LLMBUILDER_BACKEND", "cpu")
    monkeypatch.setitem(_backend.OPERATORS, "lora_shrink", {"reference": "ops.reference"})
    with pytest.raises(LLMBuilderError, match="lora_shrink: LLMBUILDER_BACKEND=cpu can't serve it: it has no"):
        _backend.serve("lora_shrink", torch.ones(20, 3, dtype=torch.float16))


def test_an_unknown_backend_is_named_with_the_nearest(monkeypatch):
    monkeypatch.setenv("LLMBUILDER_BACKEND", "cpuu")
    with pytest.raises(
        LLMBuilderError, match="cpuu names no backend, only cuda, cpu, triton, reference do; did you mean 'cpu'"
    ):
        ops.dropout(torch.ones(3), 0.5)


def test_without_triton_the_reason_says_what_to_install(monkeypatch):
    monkeypatch.setattr(_backend.importlib.util, "find_spec", lambda name: None)
    assert "pip install 'llmbuilder[triton]'" in _backend.explain("cuda")[0].why_not["triton"]


def test_without_the_extension_the_reference_serves_and_the_reason_is_told(monkeypatch):
    monkeypatch.setattr(_backend._native, "_WHY_NOT", "the extension is not built")
    row = _backend.explain("cpu")[0]
    assert (row.backend, row.why_not["cpu"]) == ("reference", "the extension is not built")


class Kernels:
    """Stands for `_C.cuda`, built with CUDA 13.2."""

    def __init__(self, driver, code="compute_80"):
        self.driver_version = lambda: driver
        self.runtime_version = lambda: 13020
        self.code = code


@pytest.mark.parametrize(
    "driver, capability, reason",
    [
        (0, (9, 0), "no NVIDIA driver is loaded"),
        (12080, (9, 0), "kernels built with CUDA 13.2, the driver speaks CUDA 12.8: it needs a newer one"),
        (13020, (7, 5), "Old GPU has compute capability 7.5, below 8.0"),
        (13000, (8, 0), "the driver speaks CUDA 13.0, which translates nothing newer"),
        (13020, (8, 0), ""),
        (14010, (12, 0), ""),
    ],
)
def test_an_unfit_driver_or_gpu_is_named(monkeypatch, driver, capability, reason):
    monkeypatch.setattr(_backend._cuda, "_kernels", Kernels(driver))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Old GPU")
    rows = {row.operator: row for row in _backend.explain("cuda", torch.bfloat16)}
    if reason:
        assert reason in rows["dropout"].why_not["cuda"]
        assert rows["dropout"].backend == ("triton" if capability >= (8, 0) else "reference")
    else:
        assert {row.backend for row in rows.values()} == {"cuda"}
    assert ("lora_expand" in rows) == (rows["lora_shrink"].backend in ("cuda", "triton"))
    assert ("lora_expand_" in rows) == (rows["lora_shrink"].backend == "reference")


@pytest.mark.parametrize(
    "capability, runs", [((8, 0), False), ((8, 6), True), ((8, 9), True), ((9, 0), True), ((10, 0), False)]
)
def test_an_older_driver_runs_what_was_made_for_the_gpu(monkeypatch, capability, runs):
    """Code of one major version runs on its later minor ones; PTX of a newer CUDA is nothing to the driver."""
    monkeypatch.setattr(_backend._cuda, "_kernels", Kernels(13000, "compute_80,sm_86,sm_90"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert (not _backend._cuda.unfit_code(torch.device("cuda", 0))) == runs


def test_fp64_on_a_gpu_goes_to_the_reference(monkeypatch):
    monkeypatch.setattr(_backend._cuda, "_kernels", Kernels(13000))
    row = _backend.explain("cuda", torch.float64)[0]
    assert (row.backend, row.why_not["cuda"]) == ("reference", "no kernels for float64")


def test_kernels_that_stand_for_those_of_a_gpu_do_so_for_a_while(monkeypatch):
    with _backend.emulated(reference):
        assert _backend._choose("dropout", torch.device("cpu"), torch.float32, None) == "cuda"
        assert _backend.update_first(torch.empty(0))
        assert _backend.explain("cpu")[0].backend == "cuda"
    assert _backend._choose("dropout", torch.device("cpu"), torch.float32, None) != "cuda"
    assert not _backend.update_first(torch.empty(0))


def test_a_new_backend_is_one_column_and_no_change_of_a_caller(monkeypatch):
    served = []

    def unfit(device, dtype):
        served.append((device, dtype))
        return ""

    monkeypatch.setattr(_backend, "BACKENDS", {"new": unfit, **_backend.BACKENDS})
    monkeypatch.setitem(_backend.OPERATORS, "dropout", {"new": "ops.reference", **_backend.OPERATORS["dropout"]})
    _backend._choose.cache_clear()
    try:
        ops.dropout(torch.ones(3, 8), 0.5)
        assert _backend.explain()[0].backend == "new"
    finally:
        _backend._choose.cache_clear()
    assert served[0] == (torch.device("cpu"), torch.float32)
