"""Python under a sanitizer's runtime, for libraries that ``build`` made in the variants asan and tsan."""

import functools
import os
import shutil
import subprocess
import sys
from pathlib import Path

from gpusim.build import HERE, compiler

# Preloaded in this order. ASan needs libstdc++ there too, for the exceptions that pybind11 throws.
RUNTIMES = {"asan": ["libasan.so", "libstdc++.so"], "tsan": ["libtsan.so"]}
OPTIONS = {
    "asan": {"ASAN_OPTIONS": "detect_leaks=0", "PYTHONMALLOC": "malloc"},
    "tsan": {"TSAN_OPTIONS": "halt_on_error=1:history_size=4"},
}


def why_not(variant: str) -> str:
    """Why it cannot run here; empty when it can."""
    missing = [name for name in RUNTIMES[variant] if not _library(name).is_absolute()]
    return f"{compiler()} has no {missing[0]}, which {variant} needs" if missing else ""


def python(variant: str, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs a script of this folder."""
    preload = ":".join(str(_library(name)) for name in RUNTIMES[variant])
    environment = {**os.environ, **OPTIONS[variant], "LD_PRELOAD": preload}
    command = [*_without_randomness(), sys.executable, str(HERE / script), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@functools.cache
def _library(name: str) -> Path:
    found = subprocess.run([compiler(), f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    return Path(found.stdout.strip())


@functools.cache
def _without_randomness() -> list[str]:
    """TSan wants certain addresses for itself, which a kernel that randomises many bits of them may have given away."""
    prefix = ["setarch", "-R"]
    if not shutil.which(prefix[0]) or subprocess.run([*prefix, "true"], capture_output=True).returncode:
        return []
    return prefix
