"""compute-sanitizer's four tools over exercise.py; in a dry run exercise.py alone."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from exercise import exercise
from stage import Stage, backend

NAME = "sanitizer"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")


def rows(stage: Stage):
    for name in stage.backends():
        if stage.dry:
            with backend(name):
                exercise("cpu")
            yield {"backend": name, "tool": "none", "result": "ran"}
            continue
        if not shutil.which("compute-sanitizer"):
            raise SystemExit("compute-sanitizer is not on the PATH; it comes with NVIDIA's CUDA toolkit")
        for tool in TOOLS:
            yield {"backend": name, "tool": tool, "result": _watch(tool, name)}


def _watch(tool: str, name: str) -> str:
    # without torch's caching each tensor has bounds of its own
    environment = {**os.environ, "LLMBUILDER_BACKEND": name, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    script = Path(__file__).with_name("exercise.py")
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 9):
        raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
    summary = next((line for line in done.stdout.splitlines() if "ERROR SUMMARY" in line), "")
    return "clean" if done.returncode == 0 else summary.strip("= ")
