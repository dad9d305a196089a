"""Our formula against NVIDIA's header, over drawn kernels."""

import random
import shutil
import subprocess
from pathlib import Path

import pytest
from codegen import occupancy

PROGRAM = r"""
#include <cuda_occupancy.h>
#include <cstdio>
int main() {
  int cc, threads_sm, shared_sm, threads, registers, shared;
  while (scanf("%d %d %d %d %d %d", &cc, &threads_sm, &shared_sm, &threads, &registers, &shared) == 6) {
    cudaOccDeviceProp p{};
    p.computeMajor = cc / 10, p.computeMinor = cc % 10, p.maxThreadsPerBlock = 1024, p.warpSize = 32, p.numSms = 1;
    p.maxThreadsPerMultiprocessor = threads_sm, p.regsPerBlock = p.regsPerMultiprocessor = 65536;
    p.sharedMemPerMultiprocessor = shared_sm, p.sharedMemPerBlock = 49152, p.reservedSharedMemPerBlock = 1024;
    p.sharedMemPerBlockOptin = shared_sm - 1024;
    cudaOccFuncAttributes a{};
    a.maxThreadsPerBlock = 1024, a.numRegs = registers, a.partitionedGCConfig = PARTITIONED_GC_OFF;
    a.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN, a.maxDynamicSharedSizeBytes = shared, a.numBlockBarriers = 1;
    cudaOccDeviceState s{};
    cudaOccResult r{};
    cudaOccMaxActiveBlocksPerMultiprocessor(&r, &p, &a, &s, threads, shared);
    printf("%d\n", r.activeBlocksPerMultiprocessor);
  }
}
"""


@pytest.fixture(scope="module")
def nvidia(tmp_path_factory):
    """NVIDIA's answer to a list of (architecture, threads, registers, shared bytes)."""
    triton = pytest.importorskip("triton", reason="its package has NVIDIA's cuda_occupancy.h")
    if not shutil.which("g++"):
        pytest.skip("no g++ to compile NVIDIA's header with")
    folder = tmp_path_factory.mktemp("occupancy")
    (folder / "main.cpp").write_text(PROGRAM)
    include = Path(triton.__file__).parent / "backends/nvidia/include"
    command = ["g++", f"-I{include}", "main.cpp", "-o", "main"]
    subprocess.run(command, cwd=folder, check=True)

    def ask(cases):
        lines = []
        for architecture, *kernel in cases:
            limits = occupancy.LIMITS[architecture]
            lines.append(" ".join(map(str, (architecture, limits.threads, limits.shared, *kernel))))
        done = subprocess.run([folder / "main"], input="\n".join(lines), capture_output=True, text=True, check=True)
        return [int(line) for line in done.stdout.split()]

    return ask


def test_equal_to_nvidias_header(nvidia):
    cases = []
    for architecture, limits in occupancy.LIMITS.items():
        for _ in range(500):
            threads, registers = 32 * random.randint(1, 32), random.randint(16, 255)
            cases.append(
                (architecture, threads, registers, random.choice([0, random.randint(0, limits.shared_of_block)]))
            )
    for case, expected in zip(cases, nvidia(cases), strict=True):
        assert occupancy.blocks(*case) == expected, case


def test_a_block_too_large_for_the_shared_memory_does_not_run():
    assert occupancy.blocks(86, 128, 32, 99 * 1024) == 1 and occupancy.blocks(86, 128, 32, 99 * 1024 + 1) == 0


def test_registers_bound_what_runs():
    assert occupancy.warps(80, 256, 32, 0) == 64 and occupancy.warps(80, 256, 64, 0) == 32
    assert occupancy.warps(80, 256, 128, 0) == 16
