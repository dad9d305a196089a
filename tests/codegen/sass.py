"""Machine code of a cubin or fatbin: resources, instructions and loops of each kernel, by NVIDIA's disassemblers.

Triton's package brings both, so that no CUDA toolkit is needed to read code.
"""

import functools
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path


@dataclass
class Kernel:
    architecture: int
    symbol: str
    name: str  # demangled
    registers: int
    stack: int
    local: int
    shared: int  # static bytes
    instructions: list[tuple[str, str]] = field(default_factory=list)  # opcode, operands
    loops: list[tuple[int, int]] = field(default_factory=list)  # first and last instruction

    def count(self, pattern: str, span: tuple[int, int] | None = None) -> int:
        """Instructions, of a span if given, whose opcode matches from its start."""
        first, last = span or (0, len(self.instructions) - 1)
        return sum(bool(re.match(pattern, opcode)) for opcode, _ in self.instructions[first : last + 1])

    def mix(self, span: tuple[int, int] | None = None) -> Counter:
        first, last = span or (0, len(self.instructions) - 1)
        return Counter(opcode.split(".")[0] for opcode, _ in self.instructions[first : last + 1])

    def innermost(self, pattern: str) -> list[tuple[int, int]]:
        """Loops with such an instruction and no loop inside that has one."""
        having = [loop for loop in self.loops if self.count(pattern, loop)]
        return [a for a in having if not any(b != a and a[0] <= b[0] and b[1] <= a[1] for b in having)]


def tool(name: str) -> str | None:
    """nvdisasm or cuobjdump: of the toolkit, or of Triton's package."""
    if found := shutil.which(name):
        return found
    try:
        import triton
    except ImportError:
        return None
    path = Path(triton.__file__).parent / "backends/nvidia/bin" / name
    return str(path) if path.exists() else None


@functools.cache
def kernels(path: Path) -> list[Kernel]:
    """Of every architecture in a fatbin or cubin."""
    path = path.resolve()
    usage = _run(tool("cuobjdump"), "-res-usage", str(path))
    with tempfile.TemporaryDirectory() as folder:
        if path.suffix == ".cubin":
            images = [path]
        else:
            _run(tool("cuobjdump"), "-xelf", "all", str(path), cwd=folder)
            images = sorted(Path(folder).glob("*.cubin"))
        return [kernel for image in images for kernel in _image(image, usage)]


def _image(image: Path, usage: str) -> list[Kernel]:
    text = _run(tool("nvdisasm"), "-c", str(image))
    architecture = int(re.search(r"\.target\s+sm_(\d+)|EF_CUDA_SM(\d+)", text).expand(r"\1\2"))
    resources = _resources(usage)
    found = []
    for symbol, body in _functions(text).items():
        known = resources.get((architecture, symbol)) or resources[0, symbol]
        kernel = Kernel(architecture, symbol, symbol, known["REG"], known["STACK"], known["LOCAL"], known["SHARED"])
        _read(kernel, body)
        found.append(kernel)
    for kernel, name in zip(found, demangled([k.symbol for k in found]), strict=True):
        kernel.name = name
    return found


def _resources(usage: str) -> dict[tuple[int, str], dict[str, int]]:
    """(architecture, symbol) -> REG, STACK, SHARED, LOCAL; a cubin's listing names no architecture: 0."""
    resources, architecture = {}, 0
    for line in usage.splitlines():
        if m := re.match(r"arch = sm_(\d+)", line):
            architecture = int(m[1])
        elif m := re.match(r"\s*Function (\S+):", line):
            symbol = m[1]
        elif "REG:" in line:
            values = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", line)}
            resources[architecture, symbol] = values
    return resources


def _functions(text: str) -> dict[str, str]:
    parts = re.split(r"(?m)^\.text\.(\S+):$", text)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def _read(kernel: Kernel, body: str) -> None:
    labels, branches = {}, []
    for line in body.splitlines():
        if m := re.match(r"\s*(\.L\w+):", line):
            labels[m[1]] = len(kernel.instructions)
        elif m := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:\{\s*)?(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*(.*?);", line):
            kernel.instructions.append((m[1], m[2]))
            if m[1].startswith("BRA") and (target := re.search(r"\((\.L\w+)\)", m[2])):
                branches.append((len(kernel.instructions) - 1, target[1]))
    kernel.loops = [(labels[to], at) for at, to in branches if labels.get(to, at) < at]


def demangled(symbols: list[str]) -> list[str]:
    if not (filt := shutil.which("c++filt")):
        return symbols
    done = subprocess.run([filt], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return [line.replace("(anonymous namespace)::", "") for line in done.stdout.splitlines()]


def _run(*command: str, cwd: str | None = None) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd).stdout
