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
