"""The choice of the CUDA build: it never fails an install unless it is insisted on, and it says why it isn't there."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CMAKE = shutil.which("cmake", path=str(Path(sys.executable).parent)) or shutil.which("cmake")
pytestmark = [
    pytest.mark.skipif(CMAKE is None, reason="needs cmake"),
    pytest.mark.skipif(sys.platform != "linux", reason="the false nvcc is a shell script"),
]

# cmake/cuda.cmake alone, with a false nvcc, and without what only a true one can do.
PROJECT = f"""
cmake_minimum_required(VERSION 3.20)
project(choice LANGUAGES NONE)
set(CMAKE_CXX_COMPILER c++)
function(enable_language)
endfunction()
function(find_package)
endfunction()
include({ROOT}/cmake/cuda.cmake)
message(STATUS "kernels: ${{CUDA_KERNELS}} for '${{CODE}}' because '${{CUDA_WHY_NOT}}'")
"""


@pytest.fixture
def configure(tmp_path, monkeypatch):
    monkeypatch.delenv("LLMBUILDER_CUDA", raising=False)
    monkeypatch.delenv("LLMBUILDER_CUDA_ARCHITECTURES", raising=False)

    def run(nvcc, gpus="", **options):
        """Exit status and output with an nvcc and an nvidia-smi that are these lines of shell."""
        (tmp_path / "CMakeLists.txt").write_text(PROJECT)
        for name, script in (("nvcc", nvcc), ("nvidia-smi", f"printf '{gpus}'")):
            (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
            (tmp_path / name).chmod(0o755)
        options = {"NVCC": tmp_path / "nvcc", "NVIDIA_SMI": tmp_path / "nvidia-smi", **options}
        command = [CMAKE, "-S", tmp_path, "-B", tmp_path / "build", *(f"-D{k}={v}" for k, v in options.items())]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.returncode, " ".join((done.stdout + done.stderr).split())

    return run


UNFIT = "echo 'unsupported GNU version! gcc versions later than 10 are not supported!' >&2; exit 1"


def test_an_unfit_nvcc_leaves_the_kernels_out_and_the_reason_in(configure):
    status, out = configure(UNFIT)
    assert status == 0
    assert "kernels: FALSE for ''" in out
    assert "could not compile for compute capability 8.0: unsupported GNU version! gcc versions later than 10" in out


def test_an_unfit_nvcc_is_an_error_where_the_kernels_are_insisted_on(configure):
    status, out = configure(UNFIT, LLMBUILDER_CUDA="ON")
    assert status != 0
    assert "LLMBUILDER_CUDA=ON, but" in out and "unsupported GNU version" in out


def test_told_to_leave_them_out_it_asks_no_nvcc(configure):
    status, out = configure("exit 1", LLMBUILDER_CUDA="OFF")
    assert status == 0
    assert "because 'this build was told LLMBUILDER_CUDA=OFF'" in out


def test_the_environment_is_heard(configure, monkeypatch):
    monkeypatch.setenv("LLMBUILDER_CUDA", "ON")
    monkeypatch.setenv("LLMBUILDER_CUDA_ARCHITECTURES", "80,90")
    assert configure(UNFIT)[0] != 0
    assert "kernels: TRUE for 'compute_80,sm_80,sm_90'" in configure("exit 0")[1]


def test_without_a_gpu_it_builds_ptx_alone(configure):
    assert "kernels: TRUE for 'compute_80'" in configure("exit 0")[1]


def test_it_builds_for_the_gpus_that_are_there_and_can_run_the_kernels(configure):
    assert "kernels: TRUE for 'compute_80,sm_90,sm_120'" in configure("exit 0", gpus="9.0\\n12.0\\n9.0\\n7.5\\n")[1]


def test_an_nvcc_that_does_not_know_a_gpu_leaves_its_code_to_the_driver(configure):
    nvcc = 'case "$*" in *sm_100*|*sm_120*) exit 1;; esac'
    status, out = configure(nvcc, LLMBUILDER_CUDA="ON")
    assert status == 0
    assert "kernels: TRUE for 'compute_80,sm_80,sm_86,sm_89,sm_90'" in out
    assert "makes no code for 100, which will run the PTX" in out


def test_the_gpus_can_be_chosen(configure):
    assert "for 'compute_80,sm_86'" in configure("exit 0", gpus="9.0\\n", LLMBUILDER_CUDA_ARCHITECTURES="86")[1]
