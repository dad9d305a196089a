"""What the examples share: a tiny model that has read about everyday things, and texts of other kinds to learn.

All of it is made here, on first use, under runs/examples; nothing is downloaded. The sentences come from a small
grammar, so that a model of 100,000 parameters can learn them in seconds, and forget them as fast.
"""

import json
import random
from pathlib import Path

import torch

import llmbuilder as lb
from llmbuilder.data import TextDataset
from llmbuilder.finetune import FineTuner, FineTuningConfig
from llmbuilder.models import GPT, GPTConfig, byte_tokenizer

FOLDER = Path("runs/examples")
STEPS = 400  # that the base model is trained for
COUNT = 300  # sentences of each kind

HOME = (
    "cat dog child baker gardener",
    "eats finds hides carries watches",
    "fish apple ball cake letter",
    "house garden",
)
CLINIC = ("nurse doctor patient surgeon", "gives checks takes notes", "dose pulse tablet fever", "ward clinic")


def base_model():
    """The base model, loaded; trained first where it is not there yet."""
    if not (FOLDER / "base").exists():
        torch.manual_seed(0)
        model = GPT(GPTConfig(vocab_size=258, n_layer=4, n_head=4, n_embd=48, block_size=128))
        model.tokenizer = byte_tokenizer()
        config = FineTuningConfig(max_steps=STEPS, learning_rate=5e-3, batch_size=16, warmup_steps=20, eval_every=None)
        FineTuner(model, text("everyday"), text("everyday-unseen"), config).train()
        lb.save_model(model.eval(), FOLDER / "base")
    return lb.load_model(FOLDER / "base")


def text(name: str) -> TextDataset:
    """One of the files as a data set."""
    return TextDataset(path(name), block_size=64)


def path(name: str) -> Path:
    """The file of one kind of text; all are written on first use."""
    if not (FOLDER / "everyday.txt").exists():
        write_all()
    return next(FOLDER.glob(f"{name}.*"))


def write_all() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, seed in (("", 0), ("-unseen", 1)):
        everyday, clinic = sentences(HOME, COUNT, seed), sentences(CLINIC, COUNT, seed)
        write(f"clinic{name}.txt", clinic)
        write(f"verse{name}.txt", [in_verse(sentence) for sentence in everyday])
        write(f"code{name}.py", [function(random.Random(seed * 1000 + n)) for n in range(2 * COUNT // 5)])
        write(f"questions{name}.jsonl", [json.dumps(question(sentence)) for sentence in everyday[: 2 * COUNT // 5]])
        write(f"tasks{name}.yaml", [f"- {{name: {task}, data: {file}, share: 0.5}}" for task, file in tasks(name)])
        write(f"everyday{name}.txt", everyday)  # the last one: where it is, all are


def tasks(name: str) -> list[tuple[str, str]]:
    return [("questions", f"questions{name}.jsonl"), ("clinic", f"clinic{name}.txt")]


def write(name: str, lines: list[str]) -> None:
    (FOLDER / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def sentences(words: tuple[str, ...], count: int, seed: int) -> list[str]:
    draw = random.Random(f"{words}/{seed}")
    who, does, what, where = (part.split() for part in words)
    return [
        f"The {draw.choice(who)} {draw.choice(does)} the {draw.choice(what)} in the {draw.choice(where)}."
        for _ in range(count)
    ]


def in_verse(sentence: str) -> str:
    return "O " + sentence.lower().removesuffix(".").replace("the ", "thy ") + ", alas!"


def question(sentence: str) -> dict[str, str]:
    words = sentence.removesuffix(".").split()
    return {"question": f"Where is the {words[1]}?", "answer": f"In the {words[-1]}."}


def function(draw: random.Random) -> str:
    first, second = draw.sample(("width", "height", "depth", "count", "price"), 2)
    sign, factor = draw.choice("+-*"), draw.randint(2, 9)
    return (
        f"def {first}_and_{second}({first}, {second}):\n    total = {first} {sign} {second}\n"
        f"    return [total, {factor} * {first}]\n\n"
    )
