"""The committed table of machine code against what the compilers make now; see report.py."""

from dataclasses import replace

import pytest
from codegen import nvcc, report, sass

TRITON = "3.9.0"  # the Triton whose code the committed table describes


def compare(rows):
    """What is worse than in the committed table, or missing from it."""
    old = {row.key: row for row in report.read()}
    new = {row.key: row for row in rows}
    compilers = {row.compiler for row in rows}
    gone = [key for key in old if key[0] in compilers and key not in new]
    worse = [f"{key}: {columns}" for key, row in new.items() if key in old and (columns := row.worse_than(old[key]))]
    assert not (gone or worse or [key for key in new if key not in old]), (
        "the table no longer describes the code; if that is meant, run python tests/codegen/report.py\n"
        + "\n".join(map(str, worse + gone + [key for key in new if key not in old]))
    )


@pytest.mark.skipif(not (nvcc.nvcc() and sass.tool("nvdisasm")), reason="no nvcc or no disassembler here")
def test_nothing_is_worse_by_nvcc():
    if nvcc.version() != nvcc.PINNED:
        pytest.skip(f"the table describes nvcc {nvcc.PINNED}, here is {nvcc.version()}")
    compare(report.nvcc_rows())


def test_nothing_is_worse_by_triton():
    triton = pytest.importorskip("triton", reason="Triton is not installed")
    if triton.__version__ != TRITON:
        pytest.skip(f"the table describes Triton {TRITON}, here is {triton.__version__}")
    compare(report.triton_rows())


def test_a_worse_row_is_seen():
    row = report.read()[0]
    assert not row.worse_than(row)
    for column, change in {"registers": 1, "stack": 8, "instructions": 1, "warps": -1, "vectors": -1}.items():
        assert replace(row, **{column: getattr(row, column) + change}).worse_than(row) == [column]
