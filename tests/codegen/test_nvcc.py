"""Gates on the machine code that nvcc makes of csrc/cuda for every architecture."""

import re

import pytest
from codegen import floors, nvcc, report, sass

pytestmark = pytest.mark.skipif(not (nvcc.nvcc() and sass.tool("nvdisasm")), reason="no nvcc or no disassembler here")


@pytest.fixture(scope="module")
def kernels():
    return [kernel for path in nvcc.all_cubins().values() for kernel in sass.kernels(path)]


@pytest.fixture(scope="module")
def rows():
    return report.nvcc_rows()


def failing(kernels, bad):
    return [f"sm_{k.architecture} {report.tidy(k.name)}: {found}" for k in kernels if (found := bad(k))]


def test_every_architecture_has_every_kernel(kernels):
    by_architecture = {a: {k.symbol for k in kernels if k.architecture == a} for a in nvcc.ARCHITECTURES}
    assert len(by_architecture[80]) > 50 and all(names == by_architecture[80] for names in by_architecture.values())


def test_nothing_spills_and_nothing_is_in_local_memory(kernels):
    assert not failing(kernels, lambda k: k.stack + k.local + k.count("STL|LDL"))


def test_every_access_knows_its_memory(kernels):
    """A generic one, by a pointer of which the compiler knows nothing, asks whether it is shared, local or global."""
    assert not failing(kernels, lambda k: k.count(r"(LD|ST)\.|QSPC"))


def test_no_double_precision_but_in_sums_of_values(kernels):
    """Half the speed of fp32 at best: EWC's value is summed in it, and nothing else."""
    others = [k for k in kernels if not re.search("penalty_kernel|sum_kernel", k.name)]
    assert not failing(others, lambda k: k.count(r"DFMA|DMUL|DADD|F2F\.F64|F2F\.\w+\.F64"))


def test_each_product_of_a_warp_is_one_instruction(kernels):
    """As many HMMA as the PTX has mma.sync: none is split, none is doubled."""
    wanted = {}
    for source in nvcc.sources():
        text = nvcc.ptx(source)
        for entry in re.split(r"(?m)^\.visible \.entry |^\.entry ", text)[1:]:
            wanted[entry.split("(")[0].strip()] = len(re.findall(r"\bmma\.sync\.", entry))
    bad = failing(
        kernels, lambda k: k.count(report.MMA) != wanted[k.symbol] and (k.count(report.MMA), wanted[k.symbol])
    )
    assert any(wanted.values()) and not bad


def test_enough_blocks_fit_to_keep_the_memory_busy(rows):
    """floors.py says how many bytes must be under way, and where too few are."""
    bad = set()
    for row in rows:
        if row.warps * 32 // row.threads < floors.blocks_needed(row.kernel, row.threads, row.architecture):
            bad.add((row.kernel.partition("<")[0], row.architecture))
    assert bad <= floors.MISSED


def test_every_block_fits(rows):
    assert not [row for row in rows if row.warps == 0]
