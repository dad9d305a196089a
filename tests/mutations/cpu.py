"""Seeded bugs in the CPU kernels, each of which the tests must catch.

    python tests/mutations/cpu.py [--isa avx2] [name ...]

For each bug the sources are copied, one passage is replaced, the extension is built for one instruction set beside the
copy, and tests/ops/test_native.py runs against it. Prints the test that caught each; exits with 1 when one got away.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Bug:
    name: str
    file: str
    right: str  # stands once in the file
    wrong: str
    large: bool = False  # shows only beyond 2**31 elements


BUGS = [
    Bug(
        "rounds: one too few",
        "include/llmbuilder/philox.h",
        "PHILOX_ROUNDS = 7",
        "PHILOX_ROUNDS = 6",
    ),
    Bug("key: high word dropped", "cpu/mask.h", "k1 = u32(key >> 32)", "k1 = 0"),
    Bug("counter: stream dropped", "cpu/mask.h", "Q{} + u64(key.stream)", "Q{}"),
    Bug("counter: row dropped", "cpu/mask.h", "u64(row + u * row_step)", "u64(u * row_step)"),
    Bug("counter: column block of the wrong vector (avx2)", "cpu/mask.h", " + g * CALLS);", ");"),
    Bug(
        "mask: slices in the wrong order (avx2)",
        "cpu/mask.h",
        "_mm256_packs_epi16(even, odd)",
        "_mm256_packs_epi16(odd, even)",
    ),
    Bug(
        "mask: threshold compared with > instead of >= (avx2)",
        "cpu/mask.h",
        "const __m256i t = _mm256_set1_epi16((short)key.threshold);",
        "const __m256i t = _mm256_set1_epi16((short)(key.threshold + 1));",
    ),
    Bug(
        "scale: of another p",
        "cpu/mask.h",
        "65536.0 / (65536.0 - key.threshold)",
        "65536.0 / (65535.0 - key.threshold)",
    ),
    Bug(
        "dropout: tail left unmasked",
        "cpu/dropout.cpp",
        "store_first(y + v, keep(load_first(x + v, some), u32(bits >> v)) * scale, some)",
        "store_first(y + v, load_first(x + v, some) * scale, some)",
    ),
    Bug(
        "dropout: tail writes whole vectors",
        "cpu/dropout.cpp",
        "const int some = least(LANES, n - v);",
        "const int some = LANES;",
    ),
    Bug(
        "dropout: row in 16 bits",
        "cpu/dropout.cpp",
        "i64 row = first / row_blocks, column",
        "i64 row = first / row_blocks % 65536, column",
        large=True,
    ),
    Bug(
        "bf16: truncated instead of rounded (but avx512_bf16)",
        "cpu/vec.h",
        "(u + 0x7fff + ((u >> 16) & 1)) >> 16;\n  const H",
        "u >> 16;\n  const H",
    ),
    Bug(
        "f16: truncated instead of rounded (avx2)",
        "cpu/vec.h",
        "_MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));\n#else",
        "_MM_FROUND_TO_ZERO | _MM_FROUND_NO_EXC));\n#else",
    ),
    Bug(
        "shrink: scale forgotten",
        "cpu/lora.cpp",
        "store_scaled(S + m0 * r, sum, rows, r, R, drop.scale())",
        "store_scaled(S + m0 * r, sum, rows, r, R, 1)",
    ),
    Bug(
        "shrink: mask of the first columns for all",
        "cpu/lora.cpp",
        "drop.draw(bits, m0, rows, c0, cols);\n      tile.template fill<true, false>",
        "drop.draw(bits, m0, rows, 0, cols);\n      tile.template fill<true, false>",
    ),
    Bug("expand: assigns instead of accumulating", "cpu/product.h", "store(to, load(to) + add);", "store(to, add);"),
    Bug(
        "expand: tail of a row written whole",
        "cpu/product.h",
        "if (left >= LANES) {\n            store(to",
        "if (left > 0) {\n            store(to",
    ),
    Bug(
        "expand: panel of the wrong column block",
        "cpu/lora.cpp",
        "s + m0 * steps, b + c0 * steps, R, scaling, bits",
        "s + m0 * steps, b + first * steps, R, scaling, bits",
    ),
    Bug(
        "grad_sb: a partial sum is missing",
        "cpu/lora.cpp",
        "for (i64 part = 0; part < parts; part++) sum +=",
        "for (i64 part = 0; part < parts - (parts > 3); part++) sum +=",
    ),
    Bug("grad_sb: sums not cleared", "cpu/lora.cpp", "    memset(at, 0, COLS * R * sizeof(float));\n", ""),
    Bug("grad_ax: mask missing in dX", "cpu/product.h", "keep(sum[i][v], kept >> (v * LANES))", "sum[i][v]"),
    Bug(
        "grad_ax: mask missing in dA",
        "cpu/product.h",
        "keep(load_up_to(x + m * stride + c, cols - c), bits.from(m, c))",
        "load_up_to(x + m * stride + c, cols - c)",
    ),
    Bug(
        "parts: cut by the number of threads",
        "cpu/lora.cpp",
        "const Parts parts = Parts::cut(M, Partial::bytes(K, R));",
        "Parts parts = Parts::cut(M, Partial::bytes(K, R));\n"
        "  if (threads == 3) parts = {2 * parts.rows, parts_of(M, 2 * parts.rows)};",
    ),
    Bug("product: rows summed without their padding", "cpu/product.h", "m < rows ? keep(", "true ? keep("),
    Bug("ewc: Fisher values ignored", "cpu/ewc.cpp", "weighted_high *= weight.high;", ""),
    Bug("ewc: gradient assigned", "cpu/ewc.cpp", "grad.low + strength * weighted_low", "strength * weighted_low"),
    Bug(
        "ewc: value summed in float",
        "cpu/ewc.cpp",
        "double total = 0;\n  for (i64 i = 0; i < n; i++) total",
        "float total = 0;\n  for (i64 i = 0; i < n; i++) total",
    ),
    Bug("ewc: chunk found in the wrong tensor", "cpu/ewc.cpp", "first()[middle] <= index", "first()[middle] < index"),
    Bug(
        "ewc: offset in 32 bits",
        "cpu/ewc.cpp",
        "(index - first()[low]) * CHUNK",
        "(i64)(int)((index - first()[low]) * CHUNK)",
        large=True,
    ),
    Bug("workspace: given out twice", "cpu/workspace.cpp", "      p.blocks.erase(best);\n", ""),
]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only bugs whose names contain one of these")
    parser.add_argument("--isa", default="avx2", help="the instruction set to build for")
    args = parser.parse_args()
    bugs = [bug for bug in BUGS if not args.names or any(name in bug.name for name in args.names)]
    for bug in bugs:
        replaced((ROOT / "csrc" / bug.file).read_text(), bug.right, bug.wrong)  # a stale one ends the run at once
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder), args.isa)
        build(tree)
        if caught := run_tests(tree, large=False):
            print(f"the tests fail without any seeded bug: {caught}")
            return 1
        missed = [bug.name for bug in bugs if not try_bug(tree, bug)]
    print(f"{len(bugs) - len(missed)} of {len(bugs)} caught" + "".join(f"\n  missed: {name}" for name in missed))
    return 1 if missed else 0


def copy_tree(tree: Path, isa: str) -> Path:
    """The sources and the tests of the kernels, with a build for ``isa`` alone."""
    for name in ("csrc", "llmbuilder"):
        shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("_C.*.so", "__pycache__"))
    (tree / "tests/ops").mkdir(parents=True)
    shutil.copy(ROOT / "tests/ops/test_native.py", tree / "tests/ops")
    shutil.copy(ROOT / "pyproject.toml", tree)
    text = (ROOT / "CMakeLists.txt").read_text()
    (tree / "CMakeLists.txt").write_text(replaced(text, "set(ISAS avx512_bf16 avx512 avx2 plain)", f"set(ISAS {isa})"))
    return tree


def build(tree: Path) -> None:
    import pybind11

    configure = ["cmake", "-S", tree, "-B", tree / "build", "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
    for command in ([*configure, f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"], ["cmake", "--build", tree / "build"]):
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{done.stdout}\n{done.stderr}")
    for library in (tree / "build").glob("_C*.so"):
        shutil.copy(library, tree / "llmbuilder")


def try_bug(tree: Path, bug: Bug) -> bool:
    path = tree / "csrc" / bug.file
    text = path.read_text()
    path.write_text(replaced(text, bug.right, bug.wrong))
    build(tree)
    caught = run_tests(tree, bug.large)
    path.write_text(text)
    print(f"{bug.name}: {caught or 'NOT CAUGHT'}", flush=True)
    return bool(caught)


def replaced(text: str, right: str, wrong: str) -> str:
    if text.count(right) != 1:
        raise SystemExit(f"stands {text.count(right)} times in the source, not once: {right}")
    return text.replace(right, wrong)


def run_tests(tree: Path, large: bool) -> str:
    """The first test that fails, or nothing when all pass."""
    marker = "large" if large else "not large"
    command = [sys.executable, "-m", "pytest", "-x", "-m", marker, "-p", "no:cacheprovider", "tests/ops/test_native.py"]
    environment = {**os.environ, "PYTHONPATH": str(tree), "LLMBUILDER_ISA": ""}
    done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
    if done.returncode == 0:
        return ""
    failed = re.search(r"^(?:FAILED|ERROR) \S*::(\S+)", done.stdout, re.MULTILINE)
    crashed = re.search(r"in (test_\w+)", done.stdout + done.stderr)
    if not failed and not crashed:
        raise SystemExit(f"pytest did not run:\n{done.stdout}\n{done.stderr}")
    return failed[1] if failed else f"{crashed[1]} (crash)"


if __name__ == "__main__":
    sys.exit(main())
