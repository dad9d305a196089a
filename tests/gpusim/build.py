"""Builds csrc/cuda with g++ over the emulator: a module ``_emulated`` with the bindings of ``_C.cuda``.

    python tests/gpusim/build.py [plain|asan|tsan]     builds it and prints where it is

Objects are kept under build/emulated by what they depend on, so that only what changed is compiled again. No CUDA
toolkit is needed: g++ on x86-64, Python's headers and pybind11.
"""

import functools
import hashlib
import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RUNTIME = [HERE / name for name in ("recorder.cpp", "block.cpp", "fiber.cpp", "memory.cpp", "numbers.cpp", "warp.cpp")]
COMMON = ["-std=c++17", "-g1", "-fPIC", "-fvisibility=hidden", "-march=native", "-ffp-contract=off"]
COMMON += ["-DLLMBUILDER_EMULATED"]
WARNINGS = ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-unused-function"]
# The runtime itself is never instrumented: it tells the sanitizers what it does.
VARIANTS = {
    "plain": ["-O1"],
    "asan": ["-O1", "-fsanitize=address", "-fno-omit-frame-pointer"],
    "tsan": ["-O1", "-fsanitize=thread"],
}


def why_not() -> str:
    """Why it cannot be built here; empty when it can."""
    if platform.machine() not in ("x86_64", "AMD64") or sys.platform != "linux":
        return "the GPU emulator switches stacks in x86-64 assembly, on Linux"
    if not shutil.which(compiler()):
        return f"no {compiler()} was found, which compiles the emulated kernels"
    return ""


def compiler() -> str:
    return os.environ.get("CXX", "g++")


def build(
    sources: Iterable[Path] | None = None,
    *,
    variant: str = "plain",
    csrc: Path = ROOT / "csrc",
    defines: Sequence[str] = (),
    cache: Path = ROOT / "build" / "emulated",
) -> Path:
    """The shared library of ``sources``: by default csrc/bindings.cpp and csrc/cuda/*.cu, which make a Python module.

    Launchers that the bindings need and ``sources`` lacks end the process when called. ``csrc`` may be a changed copy,
    and ``defines`` are further macros, as "NAME" or "NAME=VALUE".
    """
    sources = [csrc / "bindings.cpp", *sorted((csrc / "cuda").glob("*.cu"))] if sources is None else sources
    objects = []
    for source in sources:  # the sanitizers watch kernels
        how = VARIANTS[variant if source.suffix == ".cu" else "plain"]
        objects.append(_compile(source, [*how, *(f"-D{define}" for define in defines)], csrc, cache))
    objects += [_compile(source, ["-O2"], csrc, cache) for source in RUNTIME]
    return _link(objects, VARIANTS[variant], cache)


def link(sources: Iterable[Path], objects: Iterable[Path], cache: Path) -> Path:
    """The shared library of C++ sources, compiled as ``build`` does it, and of objects that are named by content."""
    compiled = [_compile(source, ["-O1"], ROOT / "csrc", cache) for source in sources]
    return _link([*compiled, *objects], [], cache)


def load(path: Path) -> ModuleType:
    """The Python module in a library, by a name of its own: pybind11 knows modules by their names alone."""
    spec = importlib.util.spec_from_file_location(f"{path.stem}._emulated", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _compile(source: Path, flags: list[str], csrc: Path, cache: Path) -> Path:
    include = [HERE, csrc, csrc / "include"]
    texts = [text for _, text in sorted(_with_includes(source, include).items())]
    if source.name == "bindings.cpp":
        include += _python_headers()
    flags = [*COMMON, *WARNINGS, *flags]
    target = cache / f"{source.stem}-{_digest(*_compiler_version(), *flags, *texts)}.o"
    search = [argument for path in include for argument in ("-I", str(path))]
    return _make(target, [compiler(), *flags, *search, "-c", "-x", "c++", str(source)])


def _link(objects: list[Path], flags: list[str], cache: Path) -> Path:
    target = cache / f"emulated-{_digest(*flags, *(path.name for path in objects))}.so"
    if target.exists():
        return target
    stubs = target.with_suffix(".s")
    lines = [f".globl {name}\n{name}: ud2" for name in _missing_launchers(objects)]
    stubs.write_text("\n".join([*lines, '.section .note.GNU-stack,"",@progbits', ""]))
    return _make(target, [compiler(), "-shared", *flags, *map(str, objects), str(stubs)])


def _missing_launchers(objects: list[Path]) -> list[str]:
    names: dict[str, set[str]] = {"U": set(), "T": set()}
    listed = subprocess.run(["nm", *map(str, objects)], capture_output=True, text=True, check=True).stdout
    for line in listed.splitlines():
        match = re.search(r"\b([UT]) (_ZN10llmbuilder3gpu\w+)", line)
        if match:
            names[match[1]].add(match[2])
    return sorted(names["U"] - names["T"])


def _make(target: Path, command: list[str]) -> Path:
    """Runs the command with ``-o target`` unless the target is there. Several processes may do so at once."""
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f"{target.stem}.{os.getpid()}{target.suffix}")
    result = subprocess.run([*command, "-o", str(part)], capture_output=True, text=True)
    if result.returncode:
        errors = [line for line in result.stderr.splitlines() if "error" in line] or result.stderr.splitlines()
        raise RuntimeError("\n".join([" ".join(command), *errors[:20]]))
    if result.stderr:
        print(result.stderr, file=sys.stderr)
    os.replace(part, target)
    return target


def _with_includes(source: Path, search: list[Path]) -> dict[str, str]:
    """The source and what it includes with quotes, by name."""
    texts: dict[str, str] = {}
    waiting = [(source.name, source)]
    while waiting:
        name, path = waiting.pop()
        if name in texts:
            continue
        texts[name] = path.read_text()
        for include in re.findall(r'^\s*#\s*include\s+"(.+)"', texts[name], re.MULTILINE):
            found = [folder / include for folder in (path.parent, *search) if (folder / include).exists()]
            waiting += [(include, at) for at in found[:1]]
    return texts


def _digest(*texts: str) -> str:
    return hashlib.sha256("\0".join(texts).encode()).hexdigest()[:16]


@functools.cache
def _compiler_version() -> tuple[str, ...]:
    """What decides the code beside flags and sources: the compiler, the processor of -march=native, and Python."""
    asked = [compiler(), "-march=native", "-Q", "--help=target", "--version"]
    return subprocess.run(asked, capture_output=True, text=True).stdout, sys.version


@functools.cache
def _python_headers() -> list[Path]:
    import pybind11

    return [Path(pybind11.get_include()), Path(sysconfig.get_paths()["include"])]


if __name__ == "__main__":
    print(build(variant=sys.argv[1] if len(sys.argv) > 1 else "plain"))
