"""Fine-tune a chat model with fused LoRA and show what it learnt and what it did not forget.

    python examples/demo [--model smollm2|tiny]

Every figure printed comes from this run; they are also in runs/demo/results.json.
"""

import argparse
import json
import pathlib
import time

import torch
from rich.console import Console
from rich.table import Table
from task import Scores, Task, answers, score

from llmbuilder.finetune import FineTuner

OUTPUT = pathlib.Path("runs/demo")
console = Console(width=110, highlight=False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="demo", description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2")
    args = parser.parse_args()
    start = time.perf_counter()
    task = prepare(args.model)
    console.print(
        f"[bold]{task.source}[/bold]\n{len(task.train)} sentences to train on; "
        + ", ".join(f"{len(s)} of {name}" for name, s in task.held_out.items())
        + " to test on, none seen before"
    )
    before = evaluate(task, "before")
    replies = [said(task)]
    results = train(task)
    after = evaluate(task, "after")
    replies.append(said(task))
    show(task, before, after, replies)
    record(results, before, after)
    model_path = ".cache/demo/tiny/model" if args.model == "tiny" else ".cache/demo/smollm2"
    console.print(
        f"{time.perf_counter() - start:.0f} seconds in all. Adapter, metrics and picture of the loss: {OUTPUT}/\n"
        f"Chat with the result:\n  .venv/bin/llmbuilder chat --model {model_path} --adapter {OUTPUT}/adapter"
    )


def prepare(name: str) -> Task:
    if name == "tiny":
        import tiny as source
    else:
        import smollm2 as source
    return source.prepare()


def evaluate(task: Task, when: str) -> dict[str, Scores]:
    scores = {}
    for name, sentences in task.held_out.items():
        with console.status(f"scoring {len(sentences)} sentences of {name}, {when} ..."):
            scores[name] = score(task, sentences)
    return scores


def three(task: Task) -> list:
    """Three sentences of each domain's end that is never seen in training, to quote."""
    return [sentence for sentences in task.held_out.values() for sentence in sentences[:3]][:3]


def said(task: Task) -> dict[str, str]:
    """What the model answers: to three sentences of the task and to everything unrelated."""
    torch.manual_seed(0)
    asked = {s.text: task.messages(s.text) for s in three(task)}
    asked |= {text: [{"role": "user", "content": text}] for text in task.unrelated}
    return dict(zip(asked, answers(task, list(asked.values()), 24), strict=True))


def train(task: Task):
    validation = task.dataset(next(iter(task.held_out.values()))[:100])  # the tuner's own view; scores are of all
    config = task.config(output_dir=str(OUTPUT))
    return FineTuner(task.model, task.dataset(task.train), validation, config, overwrite=True).train()


def show(task: Task, before: dict[str, Scores], after: dict[str, Scores], replies: list[dict[str, str]]) -> None:
    table = Table(title="sentences never seen in training")
    for column in ("domain", "accuracy", "AUC", "perplexity of the right answer"):
        table.add_column(column)
    for i, name in enumerate(task.held_out):
        b, a = before[name], after[name]
        table.add_row(
            name + ("" if i == 0 else " (domain never seen)"),
            f"{b.accuracy:.3f} → {a.accuracy:.3f}",
            f"{b.auc:.3f} → {a.auc:.3f}",
            f"{b.perplexity:.2f} → {a.perplexity:.2f}",
        )
    console.print(table)
    for title, prompts in (("the task", [s.text for s in three(task)]), ("unrelated", task.unrelated)):
        table = Table(title=f"answers: {title}")
        for column in ("prompt", "before", "after"):
            table.add_column(column)
        for prompt in prompts:
            table.add_row(prompt, replies[0][prompt], replies[1][prompt])
        console.print(table)


def record(results, before: dict[str, Scores], after: dict[str, Scores]) -> None:
    """Adds accuracy and AUC, {domain: [before, after]}, to the results that the tuner wrote."""
    path = OUTPUT / "results.json"
    saved = json.loads(path.read_text())
    for measure in ("accuracy", "auc"):
        saved[measure] = {name: [getattr(before[name], measure), getattr(after[name], measure)] for name in before}
    path.write_text(json.dumps(saved, indent=2) + "\n")
    console.print(
        f"validation perplexity (by the tuner) {results.base_perplexity:.2f} → {results.final_perplexity:.2f}, "
        f"training took {results.training_time.total_seconds():.0f} s"
    )


main()
