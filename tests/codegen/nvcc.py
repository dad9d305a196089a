"""Compiles csrc/cuda/*.cu with nvcc: once for each state of the sources, kept under build/codegen.

A source becomes PTX for compute capability 8.0 and, from that, the code of every architecture: the kernels use nothing
that came later, so CUDA C++ is translated once, as in cmake/cuda.cmake.
"""

import functools
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from codegen.sass import tool

ROOT = Path(__file__).parents[2]
ARCHITECTURES = (80, 86, 89, 90, 100, 120)
PINNED = "13.0"  # the nvcc whose code the committed table describes
FLAGS = ("-std=c++17", "-O3", "-DNDEBUG")
KEPT = ROOT / "build/codegen"


@functools.cache
def nvcc() -> str | None:
    """nvcc's path, or None."""
    candidates = [shutil.which("nvcc"), os.environ.get("CUDACXX"), "/usr/local/cuda/bin/nvcc"]
    return next((path for path in candidates if path and Path(path).exists()), None)


@functools.cache
def version() -> str:
    done = subprocess.run([nvcc(), "--version"], capture_output=True, text=True, check=True)
    return re.search(r"release (\d+\.\d+)", done.stdout)[1]


def sources(csrc: Path = ROOT / "csrc") -> list[Path]:
    return sorted((csrc / "cuda").glob("*.cu"))


def host(source: Path) -> Path:
    """An object file: the launchers' own code, and the kernels as PTX."""
    return _compiled(source, "o", ("-c", "-Xcompiler=-fPIC", "-gencode=arch=compute_80,code=compute_80"))


def ptx(source: Path) -> str:
    """The file's PTX."""
    return _ptx(host(source))


@functools.cache
def _ptx(compiled: Path) -> str:
    return subprocess.run([tool("cuobjdump"), "-ptx", compiled], capture_output=True, text=True, check=True).stdout


def cubin(source: Path, architecture: int) -> Path:
    """The file's code for one architecture."""
    text = ptx(source)
    text = text[text.index(".version") :]  # behind cuobjdump's own lines
    known = hashlib.sha256(f"{version()} sm_{architecture} {text}".encode()).hexdigest()[:16]
    path = KEPT / f"{source.stem}-{architecture}-{known}.cubin"
    if not path.exists():
        given = KEPT / f"{source.stem}-{known}.ptx"
        given.write_text(text)
        make(path, nvcc(), "-cubin", f"-arch=sm_{architecture}", str(given))
        given.unlink()
    return path


def all_cubins() -> dict[tuple[str, int], Path]:
    """By source and architecture, two at a time."""
    each(host, sources())
    wanted = [(source, architecture) for source in sources() for architecture in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        made = pool.map(lambda one: cubin(*one), wanted)
        return {(source.stem, architecture): path for (source, architecture), path in zip(wanted, made, strict=True)}


def each(make: Callable[[Path], Path], wanted: list[Path]) -> dict[Path, Path]:
    """make(source) of these sources, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(wanted, pool.map(make, wanted), strict=True))


def _compiled(source: Path, kind: str, options: tuple[str, ...]) -> Path:
    csrc = source.parents[1]
    path = KEPT / f"{source.stem}-{_digest(csrc, source, options)}.{kind}"
    include = (f"-I{csrc}", f"-I{csrc}/include")
    return path if path.exists() else make(path, nvcc(), *FLAGS, *options, *include, str(source))


def make(path: Path, *command: str) -> Path:
    """What the command writes, at ``path`` only when it is whole."""
    KEPT.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=KEPT) as folder:
        out = Path(folder) / path.name
        done = subprocess.run([*command, "-o", str(out)], capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"failed: {' '.join(command)}\n{done.stderr[:3000]}")
        out.rename(path)
    return path


def _digest(csrc: Path, source: Path, options: tuple[str, ...]) -> str:
    """Of all that the result depends on: the source, every header, the compiler and its flags."""
    known = hashlib.sha256(" ".join((version(), *FLAGS, *options)).encode())
    headers = [*(csrc / "cuda").glob("*.h"), *(csrc / "include").rglob("*.h")]
    for path in [source, *sorted(headers)]:
        known.update(path.relative_to(csrc).as_posix().encode() + b"\0" + path.read_bytes())
    return known.hexdigest()[:16]
