"""What the operators' PTX does, against what their arithmetic needs: products, Philox, vectors, sectors, banks.

Shapes are whole tiles, so that the padded product is the product.
"""

import pytest
import torch
from codegen import floors, nvcc
from ptx.operators import Case, draw

from llmbuilder.ops import _cuda

pytestmark = pytest.mark.skipif(not nvcc.nvcc(), reason="no nvcc here: the CUDA kernels' PTX can't be made")
WHOLE = {"M": 128, "N": 256, "K": 256, "threshold": 6554}
CASES = [Case(operator, torch.bfloat16, r=r, **WHOLE) for operator in floors.PRODUCTS for r in (32, 64)]


@pytest.fixture(scope="module")
def runs():
    from ptx.device import device

    found = {}
    for case in CASES:
        drawn = draw(case)
        with device().interpreting() as run:
            out = drawn.call(_cuda)
        found[case] = run, drawn, out
    return found


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matrix_products_are_the_padded_product(case, runs):
    run, _, _ = runs[case]
    executed = run.executed("mma", "m16n8k16") * 16 * 8 * 16
    assert executed == floors.PRODUCTS[case.operator](case.M, case.N, case.K, case.r)


@pytest.mark.parametrize("case", [case for case in CASES if case.operator in floors.MASKED], ids=str)
def test_a_philox_call_serves_eight_elements(case, runs):
    run, _, _ = runs[case]
    multiplications = 32 * (run.executed("mul", "hi", "u32") + run.executed("mul", "wide", "u32"))
    elements = case.M * case.K
    assert floors.SHARED_PHILOX <= multiplications / elements <= 1.3 * floors.PHILOX


@pytest.mark.parametrize("case", CASES, ids=str)
def test_matrices_travel_in_vectors_of_sixteen_bytes(case, runs):
    run, drawn, out = runs[case]
    for tensor in (drawn.tensors[name] for name in floors.READ[case.operator]):
        asked = floors.passes(case.operator, case.N, case.K, case.r) * tensor.nbytes
        assert run.requested(tensor, "read", 16) == run.requested(tensor, "read") == asked
    for tensor in out:
        if tensor.shape in ((case.M, case.N), (case.M, case.K)) and tensor.dtype == case.dtype:
            assert run.requested(tensor, "write", 16) == run.requested(tensor, "write") == tensor.nbytes


@pytest.mark.parametrize("case", CASES, ids=str)
def test_banks_and_sectors(case, runs):
    run, _, _ = runs[case]
    _, counts = run.launches[0]
    matrices = [a for a in counts.shared if "ldmatrix" in a.text]
    assert sum(a.transactions for a in matrices) == sum(a.fewest for a in matrices)
    passes, fewest = (sum(getattr(a, name) for a in counts.shared) for name in ("transactions", "fewest"))
    assert passes <= floors.BANKS.get(case.operator, 1) * fewest
    vectors = [a for a in counts.globals if ".v4." in a.text or "cp.async" in a.text]
    assert vectors and sum(a.transactions for a in vectors) == sum(a.fewest for a in vectors)
