"""Five tasks of permuted digits, one after another: what is left of the earlier ones.

scikit-learn's handwritten digits (1,797 images of 8×8, UCI), each task with the pixels in another fixed order; one
multilayer perceptron with one head of ten classes, which is not told the task. The methods are the library's own
objects, in a plain loop that calls their hooks.
"""

import itertools
import random
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn import functional as F

from llmbuilder.methods import EWC, L2, Methods, Replay, Run
from llmbuilder.methods.fisher import Scores, diagonal_fisher

TASKS, HIDDEN, DROPOUT = 5, (2000, 400), 0.2
EPOCHS, BATCH, RATE, MOMENTUM, CLIP = 15, 64, 0.05, 0.9, 1.0
TEST_SHARE = 0.25
KINDS = ("mlp",)
PANELS = {"average": "average accuracy after five tasks", "last": "accuracy on the last task"}
METHODS = ("none", "ewc", "online ewc", "l2", "replay", "joint")
GRID = {
    "ewc": [{"strength": s} for s in (100.0, 300.0, 500.0)],
    "online ewc": [{"strength": s, "decay": d} for s in (100.0, 300.0, 500.0) for d in (0.8, 1.0)],
    "l2": [{"strength": s} for s in (0.003, 0.01, 0.03)],
    "replay": [{"size": 500, "frequency": f} for f in (0.25, 0.5)],
}


def grid(name: str) -> dict[str, list[dict[str, Any]]]:
    """The settings that a search tries, by method."""
    return GRID


def make(name: str, settings: dict) -> list:
    """The method's object, anew for each task."""
    if name in ("ewc", "online ewc"):
        return [EWC(settings["strength"], decay=settings.get("decay"), estimate=classifier_fisher)]
    if name == "l2":
        return [L2(settings["strength"])]
    return [Replay(settings["size"], settings["frequency"])] if name == "replay" else []


def measure(name: str, kind: str, method: str, settings: dict, seed: int, small: bool) -> dict[str, float]:
    """One run's measures; ``name`` and ``kind`` are always the same here."""
    return measures(run(seed, method, settings, epochs=1 if small else EPOCHS))


def is_matched(last: float, plain: float) -> bool:
    """Whether the last task is learnt about as well as by plain training.

    The report allows two points of accuracy; the search keeps a margin to that.
    """
    return last >= plain - 0.015


def run(seed: int, name: str, settings: dict, epochs: int = EPOCHS) -> np.ndarray:
    """Accuracies [after task, of task] of one run."""
    tasks = permuted(seed)
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for inputs, outputs in itertools.pairwise((64, *HIDDEN)):
        layers += [nn.Linear(inputs, outputs), nn.ReLU(), nn.Dropout(DROPOUT)]
    model = nn.Sequential(*layers, nn.Linear(HIDDEN[-1], 10)).eval()
    table = np.full((TASKS, TASKS), np.nan)
    if name == "joint":
        learn(model, Methods([]), Run(model, seed, {"train": [e for train, _ in tasks for e in train]}), epochs)
        table[-1] = [accuracy(model, test) for _, test in tasks]
        return table
    past: dict = {}
    for done, (train, _) in enumerate(tasks):
        methods = Methods(make(name, settings))
        methods.load_past(past)
        learn(model, methods, Run(model, seed * 100 + done, {"train": train}), epochs)
        past = methods.past()
        table[done] = [accuracy(model, test) for _, test in tasks]
    return table


def permuted(seed: int) -> list[tuple[list[dict], list[dict]]]:
    """Train and test examples of each task; the split, the order of the pixels and all else by the seed."""
    draw = np.random.default_rng(seed)
    digits = load_digits()
    images = (digits.images.reshape(len(digits.target), 64) / 16.0).astype(np.float32)
    order = draw.permutation(len(images))
    count = int(len(images) * TEST_SHARE)
    tasks = []
    for _ in range(TASKS):
        pixels = draw.permutation(64)
        rows = [{"x": torch.from_numpy(images[i, pixels]), "label": int(digits.target[i])} for i in order]
        tasks.append((rows[count:], rows[:count]))
    return tasks


def learn(model: nn.Module, methods: Methods, run: Run, epochs: int) -> None:
    """One task, by the hooks in the order of the library's loop."""
    methods.prepare(run)
    methods.before_task(run)
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=MOMENTUM)
    model.train()
    for epoch in range(epochs):
        order = list(range(len(run.sources["train"])))
        random.Random(f"{run.seed}/{epoch}").shuffle(order)
        plan = [[("train", i) for i in order[at : at + BATCH]] for at in range(0, len(order), BATCH)]
        for keys in methods.batches(epoch, plan):
            batch = collate([run.sources[source][index] for source, index in keys])
            optimizer.zero_grad()
            F.cross_entropy(model(batch["x"]), batch["labels"]).backward()
            methods.penalty()
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            optimizer.step()
    model.eval()
    methods.after_task(run)


def classifier_fisher(run: Run, params: dict, examples: list[dict], empirical: bool) -> dict:
    """F a image: each image is one token."""

    def score(batch: dict) -> Scores:
        return Scores(run.model(batch["x"]), batch["labels"], torch.arange(len(batch["labels"])))

    batches = [collate(examples[at : at + 256]) for at in range(0, len(examples), 256)]
    return diagonal_fisher(run.model, params, batches, score, empirical=empirical, seed=run.seed)


def collate(examples: list[dict]) -> dict[str, torch.Tensor]:
    return {"x": torch.stack([e["x"] for e in examples]), "labels": torch.tensor([e["label"] for e in examples])}


@torch.no_grad()
def accuracy(model: nn.Module, examples: list[dict]) -> float:
    batch = collate(examples)
    return float((model(batch["x"]).argmax(-1) == batch["labels"]).float().mean())


def measures(table: np.ndarray) -> dict[str, float]:
    """Average accuracy at the end; accuracy of the last task, of the earlier ones at the end and when they were new."""
    return {
        "average": float(table[-1].mean()),
        "last": float(table[-1, -1]),
        "earlier": float(table[-1, :-1].mean()),
        "learned": float(np.diag(table)[:-1].mean()),
        "forgetting": float((np.diag(table)[:-1] - table[-1, :-1]).mean()),
    }
