"""What Triton makes of kernels/ for sm_80, interpreted on small shapes: right by the rule for errors, none refused."""

import pytest
import torch

pytest.importorskip("triton", reason="Triton is not installed")
from ptx.operators import Case, draw
from ptx.triton_device import interpreting

from llmbuilder.kernels import dropout as of_dropout
from llmbuilder.kernels import lora
from llmbuilder.ops import reference

BF16, F16, F32 = torch.bfloat16, torch.float16, torch.float32
CASES = [
    Case("lora_shrink", BF16, M=37, K=96, r=8, threshold=6554),
    Case("lora_expand", BF16, M=18, N=63, r=40, sliced=True),
    Case("lora_grad_sb", BF16, M=37, N=72, r=8),
    Case("lora_grad_ax", F16, M=37, K=96, r=8, threshold=6554),
    Case("lora_fused", BF16, M=37, N=72, K=96, r=8),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_operator(case, check_error):
    drawn = draw(case)
    with interpreting(seed=int(torch.randint(1, 1000, ()))) as run:
        out = drawn.call(lora)
    assert run.launches
    for name, *values in zip(("first", "second"), out, drawn.plain, drawn.exact, strict=False):
        check_error(*values, name=name, dtype=case.dtype)


def test_dropout():
    x, seed = torch.randn(5, 77), torch.tensor(9)
    with interpreting(seed=3):
        y = of_dropout.dropout(x, 6554, seed, 1)
    assert torch.equal(y, reference.dropout(x, 6554, seed, 1))
