"""The product does not need triton: its operators import none, and without it they say what is missing."""

import subprocess
import sys


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_importing_the_operators_does_not_import_triton():
    code = """
import sys, torch
before = "triton" in sys.modules
import llmbuilder.ops, llmbuilder.ops._cpu, llmbuilder.kernels
print(before, "triton" in sys.modules)
"""
    before, after = run(code).stdout.split()
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
    result = run(code)
    assert result.returncode == 0, result.stderr
    assert "True" in result.stdout
    assert "pip install 'llmbuilder[triton]'" in result.stdout
