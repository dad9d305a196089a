"""Triton's dropout without a GPU: interpreted, compiled and its instructions counted; and the product without it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("interpreted_dropout.py")


def run(*arguments):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=300)


def test_interpreted_it_gives_the_references_bits_within_bounds():
    pytest.importorskip("triton")
    result = run(str(SCRIPT))
    assert (result.returncode, result.stdout.strip()) == (0, "all equal"), result.stderr


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp16"])
def test_compiled_one_philox_call_serves_eight_elements_in_wide_accesses(capability, dtype, monkeypatch):
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from llmbuilder.kernels import dropout

    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "0")
    constants = {"ROWS": dropout.ROWS, "COLUMNS": dropout.COLUMNS}
    signature = {"x": f"*{dtype}", "y": f"*{dtype}", "M": "i32", "K": "i32", "seed": "*i64", "stream": "i64"}
    signature |= {"threshold": "i32", "scale": "fp32", "tiles": "i32", **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(
        fn=dropout.dropout_kernel,
        signature=signature,
        constexprs=constants,
        attrs={(i,): [["tt.divisibility", 16]] for i in (0, 1, 3)},  # x, y and K
    )
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": 4})
    ptx, elements = compiled.asm["ptx"], dropout.ROWS * dropout.COLUMNS // (4 * 32)
    ideal = 14 * elements / 8  # two wide products a round, seven rounds
    assert len(re.findall(r"mul\.(?:hi|wide)\.u32", ptx)) <= 1.3 * ideal
    for access in ("ld", "st"):
        wide = re.findall(rf"{access}\.global\.v4\.b32", ptx)
        assert len(wide) * 16 == elements * (4 if dtype == "fp32" else 2), f"{access} {capability} {dtype}"


def test_importing_the_operators_does_not_import_triton():
    code = """
import sys, torch
before = "triton" in sys.modules
import llmbuilder.ops, llmbuilder.ops._cpu, llmbuilder.kernels
print(before, "triton" in sys.modules)
"""
    before, after = run("-c", code).stdout.split()
    assert before == after


def test_without_triton_the_product_works_and_says_what_is_missing():
    code = """
import importlib.util, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "triton":
            raise ModuleNotFoundError("No module named 'triton'", name="triton")
sys.meta_path.insert(0, Absent())
find_spec = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "triton" else find_spec(name, *rest)
import torch
from llmbuilder import ops
from llmbuilder.ops import _backend
print(ops.dropout(torch.ones(4, 9), 0.5).sum() >= 0, _backend.explain("cuda")[0].why_not["triton"])
"""
    result = run("-c", code)
    assert result.returncode == 0, result.stderr
    assert "True" in result.stdout
    assert "pip install 'llmbuilder[triton]'" in result.stdout
