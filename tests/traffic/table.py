"""Writes the table of traffic into docs/kernels.md from the counters: python tests/traffic/table.py"""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from gpusim.build import build
from gpusim.harness import Emulator
from traffic import layer

PAGE = Path(__file__).parents[2] / "docs/kernels.md"
BEGIN, END = "<!-- traffic: begin (written by tests/traffic/table.py) -->", "<!-- traffic: end -->"


def table(emulator: Emulator) -> str:
    """Counts of a layer's forward and backward pass; the emulated kernels serve meanwhile."""
    before = os.environ.get("LLMBUILDER_BACKEND")
    os.environ["LLMBUILDER_BACKEND"] = "cuda"
    try:
        with emulator.serving():
            rows = _rows(emulator)
    finally:
        os.environ.pop("LLMBUILDER_BACKEND")
        if before:
            os.environ["LLMBUILDER_BACKEND"] = before
    heads = ("forward and backward of one layer", "our kernels", "torch's operators", "total", "exposed")
    lines = [f"| {' | '.join(heads)} |", "|---|---|---|---|---|"]
    frozen = layer.frozen().total
    for name, moved in rows:
        counts = {kernel.removesuffix("_kernel"): units for kernel, units in moved.kernels.items() if units}
        ours = ", ".join(f"{kernel} {units:g}" for kernel, units in counts.items())
        exposed = moved.exposed if moved.kernels and moved.products else moved.total - frozen
        lines.append(f"| {name} | {ours or '—'} | {moved.products:g}U | {moved.total:g}U | {exposed:g}U |")
    return "\n".join(lines)


def _rows(emulator: Emulator) -> list[tuple[str, layer.Moved]]:
    return [
        ("frozen layer", layer.frozen()),
        ("PEFT, p = 0.1", layer.peft(16)),
        ("library's products, r ≤ 32", layer.ours(emulator, 16)),
        ("library's products, r > 32", layer.ours(emulator, 64)),
        ("`lora_fused`, r ≤ 32", layer.ours(emulator, 16, fused=True)),
    ]


def write() -> None:
    text = PAGE.read_text()
    head, rest = text.split(BEGIN)
    PAGE.write_text(f"{head}{BEGIN}\n{table(Emulator(build()))}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    write()
