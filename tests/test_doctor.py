"""The doctor: right operators pass, wrong ones are found, and what is not there is said."""

import subprocess
import sys

import pytest
import torch

from llmbuilder import doctor
from llmbuilder.cli import main
from llmbuilder.ops import _backend, reference


def test_every_operator_has_a_case():
    assert doctor.CASES.keys() == _backend.OPERATORS.keys()


def test_the_operators_of_this_machine_are_right():
    found = list(doctor.checks("cpu"))
    assert len(found) == len(doctor.DTYPES) * len(_backend.explain("cpu"))
    assert [check for check in found if check.wrong] == []


def slightly_wrong(operator: str, dtype: torch.dtype):
    """The reference, with one value of its last result off by a hundred units in the last place."""

    def spoilt(*arguments):
        grads = [param.grad for param in arguments[0]] if operator == "ewc_penalty_" else []
        result = getattr(reference, operator)(*arguments)
        touched = {"lora_expand_": arguments[0], "ewc_accumulate_": arguments[0]}
        out = grads or touched.get(operator, result)
        while not isinstance(out, torch.Tensor):
            out = out[0]
        out.view(-1)[out.abs().argmax()] *= 1 + 100 * torch.finfo(dtype).eps
        return result

    return spoilt


@pytest.mark.parametrize("dtype", doctor.DTYPES, ids=str)
@pytest.mark.parametrize("operator", doctor.CASES)
def test_an_operator_that_is_slightly_wrong_fails(operator, dtype, monkeypatch):
    monkeypatch.setattr(_backend, "serve", lambda name, tensor: slightly_wrong(name, dtype))
    assert "is right" in doctor._wrong(operator, "cpu", dtype)


def test_an_operator_that_gives_nan_fails(monkeypatch):
    monkeypatch.setattr(_backend, "serve", lambda name, tensor: lambda x, *_: torch.full_like(x, torch.nan))
    assert "error nan" in doctor._wrong("dropout", "cpu", torch.float32)


def test_an_operator_that_raises_fails_with_its_words_and_the_command_with_1(monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("bus error")

    serve = _backend.serve
    monkeypatch.setattr(_backend, "serve", lambda name, tensor: broken if name == "dropout" else serve(name, tensor))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert "FAILED in bfloat16: RuntimeError: bus error" in out
    lines = [line.split() for line in out.splitlines()]
    assert ["dropout", "FAILED"] in [[line[0], line[2]] for line in lines if len(line) > 3]
    assert ["lora_shrink", "ok"] in [[line[0], line[2]] for line in lines if len(line) > 3]


def test_the_report_says_what_is_here_and_what_nobody_has_seen(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    served_here = [row.operator for row in _backend.explain("cpu")]
    for word in (torch.__version__, "transformers", "triton", "OpenMP", "gpu", *served_here):
        assert word in out
    assert "not cuda: " in out
    assert "None has run on a GPU yet." in out


def test_driver_runtime_and_torch_are_compared_side_by_side(monkeypatch):
    class Kernels:
        driver_version = staticmethod(lambda: 12080)
        runtime_version = staticmethod(lambda: 13000)

    monkeypatch.setattr(doctor._cuda, "_kernels", Kernels)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    text = doctor.machine()["cuda"]
    assert "torch built with CUDA 12.8" in text
    assert "kernels built with CUDA 13.0, the driver speaks CUDA 12.8" in text


def test_kernels_that_are_not_built_say_why(monkeypatch):
    monkeypatch.setattr(doctor._cuda, "_kernels", None)
    monkeypatch.setattr(doctor._native, "cuda_why_not", lambda: "no nvcc was found")
    assert "no CUDA kernels: no nvcc was found" in doctor.machine()["cuda"]


def test_a_forced_backend_is_told(monkeypatch, capsys):
    monkeypatch.setenv("LLMBUILDER_BACKEND", "reference")
    assert main(["doctor"]) == 0
    assert "LLMBUILDER_BACKEND=reference forces another" in capsys.readouterr().out


def test_a_forced_backend_that_cannot_serve_is_a_failure(monkeypatch, capsys):
    monkeypatch.setenv("LLMBUILDER_BACKEND", "cuda")
    assert main(["doctor"]) == 1
    assert "no backend can serve it" in capsys.readouterr().out


def test_one_openmp_pool_is_loaded():
    statement = "from llmbuilder import doctor; print(doctor._openmp())"  # a fresh process: nobody else's libraries
    done = subprocess.run([sys.executable, "-P", "-c", statement], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("1 OpenMP pool:")
