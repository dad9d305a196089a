"""PTX text to a Kernel: its parameters, registers, shared memory and instructions.

Only what nvcc and Triton emit is understood; anything else is an error, never skipped.
"""

import re
from dataclasses import dataclass, field

from ptx.errors import PtxError
from ptx.values import size_of

PARAMETER_BASE = 1 << 12  # where the window of parameters lies
SHARED_BASE = 1 << 16  # where the shared window lies; global buffers are host memory, far above
SHARED_END = 1 << 24
DYNAMIC_ALIGNMENT = 128


@dataclass(frozen=True)
class Instruction:
    index: int
    opcode: tuple[str, ...]  # "ld.global.v4.u32" in its parts
    operands: tuple[str, ...]  # registers, constants, "[address+4]", "{a, b}"
    guard: str | None  # the predicate of "@%p1"
    guard_negated: bool
    text: str


@dataclass
class Kernel:
    name: str
    parameters: dict[str, tuple[int, int]]  # name -> (offset, bytes), as the caller lays them out
    registers: dict[str, str] = field(default_factory=dict)  # name -> type
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, int] = field(default_factory=dict)  # name -> address in the shared window
    static_shared: int = 0  # bytes

    @property
    def dynamic_start(self) -> int:
        return _aligned(self.static_shared, DYNAMIC_ALIGNMENT)


class Module:
    """The kernels of one PTX text, each parsed when it is first asked for."""

    def __init__(self, text: str):
        self._text = _stripped(text)
        entries = re.finditer(r"\.entry\s+([\w$]+)\s*\((.*?)\)", self._text, re.S)
        self._entries = {entry[1]: entry for entry in entries}
        first = min((entry.start() for entry in self._entries.values()), default=0)
        self._head = self._text[:first]
        self._parsed: dict[str, Kernel] = {}

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def kernel(self, name: str = "") -> Kernel:
        """The kernel of this name, or else the only one that has it in its name."""
        found = [name] if name in self._entries else [one for one in self._entries if name in one]
        if len(found) != 1:
            raise PtxError(f"{len(found)} kernels have {name!r} in their name, not one: {self.names}")
        if found[0] not in self._parsed:
            self._parsed[found[0]] = self._parse(self._entries[found[0]])
        return self._parsed[found[0]]

    def _parse(self, entry: re.Match) -> Kernel:
        kernel = Kernel(entry[1], _parameters(entry[2]))
        body = _body(self._text, entry.end())
        _declare_shared(kernel, self._head, body)
        for statement in body.split(";"):
            _statement(kernel, statement)
        return kernel


def parse(text: str, name: str = "") -> Kernel:
    return Module(text).kernel(name)


def _stripped(text: str) -> str:
    """Without comments and what debuggers and profilers read."""
    text = re.sub(r"//[^\n]*", "", text)
    text = re.sub(r"(?m)^\s*\.(loc|file|pragma)\b.*$", "", text)
    return re.split(r"(?m)^\s*\.section\b", text)[0]


def _parameters(declared: str) -> dict[str, tuple[int, int]]:
    parameters, offset = {}, 0
    for one in filter(str.strip, declared.split(",")):
        block = re.search(r"\.align\s+(\d+)\s+\.b8\s+([\w$]+)\[(\d+)\]", one)
        if block:  # a struct passed by value
            alignment, name, size = int(block[1]), block[2], int(block[3])
        else:
            alignment = size = size_of(re.search(r"\.param\s+\.(\w+)", one)[1])
            name = one.split()[-1]
        offset = _aligned(offset, alignment)
        parameters[name] = (offset, size)
        offset += size
    return parameters


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment


def _body(text: str, start: int) -> str:
    first = text.index("{", start)
    depth = 0
    for brace in re.compile(r"[{}]").finditer(text, first):
        depth += 1 if brace[0] == "{" else -1
        if not depth:
            return text[first + 1 : brace.start()]
    raise PtxError("the kernel's body does not end")


def _declare_shared(kernel: Kernel, head: str, body: str) -> None:
    """Arrays in the body, and those before the kernels that the body names."""
    pattern = r"(\.extern\s+)?\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?"
    used = set(re.findall(r"[\w$]+", body))
    dynamic = []
    for extern, alignment, type_, name, length in re.findall(pattern, head + body):
        if extern:
            dynamic.append(name)
        elif name in used:
            start = _aligned(kernel.static_shared, int(alignment or size_of(type_)))
            kernel.shared[name] = SHARED_BASE + start
            kernel.static_shared = start + size_of(type_) * int(length or 1)
    for name in dynamic:
        kernel.shared[name] = SHARED_BASE + kernel.dynamic_start


def _statement(kernel: Kernel, statement: str) -> None:
    statement = statement.strip()
    while True:  # scopes of inline assembly and labels stand before a statement
        if statement[:1] in ("{", "}"):
            statement = statement[1:].strip()
        elif label := re.match(r"([\w$]+):", statement):
            kernel.labels[label[1]] = len(kernel.instructions)
            statement = statement[label.end() :].strip()
        else:
            break
    if not statement or re.match(r"\.(extern\s+)?\.?shared\b", statement):
        return
    if statement.startswith(".reg"):
        _registers(kernel, statement)
    elif statement.startswith("."):
        raise PtxError(f"directive not modelled: {statement}")
    else:
        kernel.instructions.append(_instruction(len(kernel.instructions), statement))


def _registers(kernel: Kernel, statement: str) -> None:
    _, type_, names = statement.split(None, 2)
    for name in map(str.strip, names.split(",")):
        counted = re.fullmatch(r"(.*)<(\d+)>", name)
        for one in [f"{counted[1]}{i}" for i in range(int(counted[2]))] if counted else [name]:
            kernel.registers[one] = type_[1:]


def _instruction(index: int, statement: str) -> Instruction:
    text = " ".join(statement.split())
    guard = re.match(r"@(!?)([%\w$]+)\s+", text)
    opcode, _, rest = text[guard.end() if guard else 0 :].partition(" ")
    operands = re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\[\]{}]+", rest)
    return Instruction(
        index,
        tuple(opcode.split(".")),
        tuple(operand.strip() for operand in operands if operand.strip()),
        guard[2] if guard else None,
        bool(guard and guard[1]),
        text,
    )
