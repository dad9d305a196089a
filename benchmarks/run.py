"""Run every benchmark in both malloc modes, write results/*.csv, and put the table into the README (`make bench`).

python benchmarks/run.py [name ...]     default: all of dropout ewc layer step examples; `table` only rewrites the table
"""

import pathlib
import sys

from harness import RESULTS, read, run_all_modes

ALL = ("dropout", "ewc", "layer", "step", "examples")
README = pathlib.Path(__file__).resolve().parents[1] / "README.md"
BEGIN, END = "<!-- benchmarks: begin (written by `make bench`) -->", "<!-- benchmarks: end -->"


def find(name, /, **wanted):
    """The one row of results/<name>.csv with these values, or None."""
    rows = [row for row in read(name) if all(row[k] == v for k, v in wanted.items())]
    return rows[0] if rows else None


def lines():
    """(claim, floor, function of a malloc mode -> (figure, passed)) for every floor."""
    for dtype in ("float32", "bfloat16"):
        yield (
            f"dropout forward+backward, 2048×2560 {dtype}, against torch",
            "≥ 10×",
            lambda m, d=dtype: ratio(
                "dropout", "torch / it", 10, malloc=m, dtype=d, shape="2048x2560", name="llmbuilder"
            ),
        )
    yield (
        "EWC value+gradient, 110 M parameters, against an Avalanche-style loop",
        "≥ 4×",
        lambda m: ratio("ewc", "loop / it", 4, malloc=m, name="llmbuilder"),
    )
    for dtype in ("float32", "bfloat16"):
        for shape in ("768x768", "2048x2048", "4096x4096"):
            yield (
                f"LoRA overhead over the frozen layer, {shape} {dtype}, p=0.1, r=16",
                "≤ ⅓ of PEFT's",
                lambda m, d=dtype, s=shape: overhead(malloc=m, dtype=d, shape=s),
            )
    for dtype, floor in (("fp32", 2.0), ("bf16", 1.6)):
        yield (
            f"whole step, 124 M Llama-like, {dtype}, against PEFT as installed",
            f"≥ {floor}×",
            lambda m, d=dtype, f=floor: ratio("step", "peft / it", f, malloc=m, dtype=d, name="llmbuilder"),
        )
        yield (
            f"the same, working memory above the model, {dtype}",
            "≤ 0.55×",
            lambda m, d=dtype: memory(malloc=m, dtype=d),
        )
    yield (
        'whole step, fp32, PEFT tuned ("medium") against PEFT as installed',
        "for comparison",
        lambda m: ratio("step", "peft / it", 0, malloc=m, dtype="fp32-medium", name="peft"),
    )
    yield (
        "whole step, bf16, PEFT with bf16 adapters against PEFT as installed",
        "for comparison",
        lambda m: ratio("step", "peft / it", 0, malloc=m, dtype="bf16", name="peft (bf16 adapters)"),
    )
    yield (
        "the demo's examples per second, against PEFT with Trainer",
        "≥ 1.5×",
        lambda m: ratio("examples", "peft / it", 1.5, malloc=m, name="llmbuilder"),
    )


def ratio(name, column, floor, /, **wanted):
    row = find(name, **wanted)
    value = row and float(row[column])
    return row and (f"{value:.1f}×" if value >= 10 else f"{value:.2f}×", value >= floor)


def overhead(**wanted):
    ours, peft = find("layer", name="llmbuilder", **wanted), find("layer", name="peft", **wanted)
    if not (ours and peft):
        return None
    text = f"{float(ours['overhead']):.0%} against {float(peft['overhead']):.0%}"
    return text, float(ours["overhead"]) <= float(peft["overhead"]) / 3


def memory(**wanted):
    row = find("step", name="llmbuilder", **wanted)
    share = row and float(row["of peft's"])
    return row and (f"{share:.2f}× ({row['working MB']} MB)", share <= 0.55)


def table():
    """The README's table: a floor a line, both malloc modes, a missed floor in bold with the word `missed`."""
    out = ["| what is measured | floor | malloc keeping its memory | malloc as it is |", "|---|---|---|---|"]
    for claim, floor, figure in lines():
        cells = []
        for mode in ("keep", "system"):
            found = figure(mode)
            text, passed = found if found else ("not measured", True)
            cells.append(text if passed or mode == "system" else f"**{text}, missed**")
        out.append(f"| {claim} | {floor} | {cells[0]} | {cells[1]} |")
    any_row = read("step")[0]
    out += [
        "",
        f"Medians of interleaved runs on {any_row['cpu']}, {any_row['threads']} threads, {any_row['date']}; "
        f"torch {any_row['torch']}, peft {any_row['peft']}, transformers {any_row['transformers']}. "
        "The floors are for malloc keeping its memory; every row of every run: benchmarks/results/.",
    ]
    return "\n".join(out)


def write_table():
    text = README.read_text(encoding="utf-8")
    head, rest = text.split(BEGIN)
    README.write_text(head + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1], encoding="utf-8")


def main():
    names = sys.argv[1:] or list(ALL)
    unknown = [n for n in names if n not in (*ALL, "table")]
    if unknown:
        raise SystemExit(f"unknown benchmark {unknown[0]}; there are: {' '.join(ALL)} table")
    for name in names:
        if name != "table":
            run_all_modes(str(RESULTS.parent / f"bench_{name}.py"))
    write_table()
    print(table())


if __name__ == "__main__":
    main()
