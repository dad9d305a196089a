"""The table of all kernels' machine code: python tests/codegen/report.py writes benchmarks/results/codegen.csv.

A row is a kernel of one compiler for one architecture. `warps` is how many a multiprocessor holds at once, `mma` the
instructions for tensor cores, `vectors` loads and stores of 16 bytes to global memory, `wide` multiplications with a
high word.
"""

import csv
import functools
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from codegen import nvcc, occupancy, sass

TESTS = Path(__file__).parents[1]
PATH = TESTS.parent / "benchmarks/results/codegen.csv"
MMA = r"HMMA|HGMMA|UTC\w*MMA"
VECTORS = r"(LDG|STG|LDGSTS)\.E\.(\w+\.)*128"
WIDE = r"IMAD\.WIDE\.U32|IMAD\.HI\.U32|UIMAD\.WIDE\.U32"


@dataclass(frozen=True)
class Row:
    compiler: str
    kernel: str
    architecture: int
    threads: int
    registers: int
    stack: int
    shared: int
    warps: int
    instructions: int
    mma: int
    vectors: int
    wide: int

    @property
    def key(self) -> tuple[str, str, int]:
        return self.compiler, self.kernel, self.architecture

    def worse_than(self, old: "Row") -> list[str]:
        """The columns in which this is worse."""
        larger = [name for name in ("registers", "stack", "instructions") if getattr(self, name) > getattr(old, name)]
        return larger + [name for name in ("warps", "vectors") if getattr(self, name) < getattr(old, name)]


def row(compiler: str, kernel: sass.Kernel, name: str, threads: int, shared: int) -> Row:
    return Row(
        compiler,
        name,
        kernel.architecture,
        threads,
        kernel.registers,
        kernel.stack + kernel.local,
        shared,
        occupancy.warps(kernel.architecture, threads, kernel.registers, shared),
        len(kernel.instructions),
        kernel.count(MMA),
        kernel.count(VECTORS),
        kernel.count(WIDE),
    )


@functools.cache
def nvcc_rows() -> list[Row]:
    from codegen.launches import launches

    known, rows = launches(), []
    for path in nvcc.all_cubins().values():
        for kernel in sass.kernels(path):
            if kernel.symbol not in known:
                raise LookupError(f"codegen/launches.py never launches {kernel.name}")
            launch = known[kernel.symbol]
            threads = launch.block[0] * launch.block[1] * launch.block[2]
            rows.append(
                row(f"nvcc {nvcc.version()}", kernel, tidy(kernel.name), threads, kernel.shared + launch.shared)
            )
    return sorted(rows, key=lambda r: r.key)


@functools.cache
def triton_rows() -> list[Row]:
    """Of the operators' default configurations, for bf16."""
    return sorted(set(_triton_rows()), key=lambda r: r.key)


def _triton_rows() -> Iterator[Row]:
    import triton

    sys.path.insert(0, str(TESTS / "triton"))
    import aot
    from ptx.operators import CALLS, Case, draw

    from llmbuilder.kernels import dropout, lora

    for architecture in nvcc.ARCHITECTURES:
        for operator in CALLS:
            drawn = draw(Case(operator, torch.bfloat16, 64, 64, 64, 16, threshold=6554))
            with aot.target(architecture) as compiled:
                drawn.call(dropout if operator == "dropout" else lora)
            for kernel in compiled:
                name = f"{operator}: {kernel.name}"
                yield row(f"triton {triton.__version__}", kernel.sass, name, kernel.threads, kernel.shared)


def tidy(name: str) -> str:
    """ "shrink_kernel<MathBF16, ShrinkTile<32, 2, 2, 4, 2>, true>" of a demangled function."""
    name = name.replace("llmbuilder::gpu::", "").replace("llmbuilder::", "").removeprefix("void ")
    depth = 0
    for at, letter in enumerate(name):
        depth += {"<": 1, ">": -1}.get(letter, 0)
        if letter == "(" and depth == 0:
            return name[:at]
    return name


def read() -> list[Row]:
    with PATH.open(newline="") as file:
        kinds = {field.name: field.type for field in fields(Row)}
        return [Row(**{k: int(v) if kinds[k] is int else v for k, v in line.items()}) for line in csv.DictReader(file)]


def write(rows: list[Row]) -> None:
    with PATH.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(one) for one in rows)


if __name__ == "__main__":
    write(nvcc_rows() + triton_rows())
