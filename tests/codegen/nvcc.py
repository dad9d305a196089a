"""Compiles csrc/cuda/*.cu with nvcc: once for each state of the sources, kept under build/codegen.

One invocation makes the code of all architectures of a file. Flags are those of CMakeLists.txt's release build.
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


def fatbin(source: Path, architectures: tuple[int, ...] = ARCHITECTURES) -> Path:
    """The file's code for every architecture."""
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in architectures]
    return _compiled(source, "fatbin", ("-fatbin", "--threads=2", *targets))


def host(source: Path) -> Path:
    """An object file: the launchers' own code, and the kernels as PTX for sm_80."""
    return _compiled(source, "o", ("-c", "-Xcompiler=-fPIC", "-gencode=arch=compute_80,code=compute_80"))


def ptx(source: Path) -> str:
    """The file's PTX for sm_80."""
    return subprocess.run([tool("cuobjdump"), "-ptx", host(source)], capture_output=True, text=True, check=True).stdout


def each(make: Callable[[Path], Path], csrc: Path = ROOT / "csrc") -> dict[Path, Path]:
    """make(source) of every source, two at a time."""
    with ThreadPoolExecutor(2) as pool:
        return dict(zip(sources(csrc), pool.map(make, sources(csrc)), strict=True))


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
