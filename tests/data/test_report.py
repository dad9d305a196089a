"""The paragraph that tells what became of the data."""

from llmbuilder.data.report import DataReport


def test_a_full_report_reads_as_a_paragraph():
    report = DataReport(
        "d.jsonl",
        rows=9,
        kept=2,
        malformed=[f"d.jsonl:{n}: not JSON" for n in range(1, 6)],
        skipped_files=["a.png"],
        without_targets=["d.jsonl:8: no assistant turn"],
        truncated=1,
        tokens_lost=12,
        dropped_turns=3,
        single_tokens=1,
        examples=2,
        tokens=40,
        targets=11,
        notes=["Task conversation"],
    )
    assert str(report) == (
        "d.jsonl: 9 rows read, 2 kept. 2 examples with 40 tokens, 11 of them targets. Task conversation. "
        "5 malformed: d.jsonl:1: not JSON; d.jsonl:2: not JSON; d.jsonl:3: not JSON; and 2 more. "
        "1 without a target: d.jsonl:8: no assistant turn. "
        "1 example truncated, 12 tokens lost; a larger max_seq_length keeps them. 3 turns dropped. "
        "1 block of a single token, with nothing to predict. 1 other file skipped: a.png."
    )


def test_what_did_not_happen_is_not_mentioned():
    report = DataReport("d.txt", rows=1, kept=1, examples=1, tokens=5, targets=4)
    assert str(report) == "d.txt: 1 row read, 1 kept. 1 example with 5 tokens, 4 of them targets."
