"""A native GPT made on the spot from the text of this repository: the same demo with nothing to download.

The model first learns to continue lines of the repository (full fine-tuning from random weights), then LoRA teaches it
to tell code from prose. The domain that it has never seen is C++ with its comments, and the licence.
"""

import io
import pathlib
import tokenize

import torch
from task import Sentence, Task, balanced, share

import llmbuilder as lb
from llmbuilder.data import TextDataset
from llmbuilder.finetune import FineTuner, FineTuningConfig
from llmbuilder.models import GPT, GPTConfig, train_tokenizer

ROOT = pathlib.Path(__file__).resolve().parents[2]
BASE = pathlib.Path(".cache/demo/tiny")
SHORTEST, LONGEST = 25, 110


def prepare() -> Task:
    python, other = python_lines(), cpp_lines() + licence_lines()
    train = [s for s in python if share(s.text) >= 0.3]
    held_out = [s for s in python if share(s.text) < 0.3]
    return Task(
        model=pretrained(train),
        instruction="code or prose?",
        words=("code", "prose"),
        train=balanced(train, 960),
        held_out={"python": balanced(held_out, 400), "cpp": balanced(other, 400)},
        unrelated=["def main(", "import torch", "Licensed under the"],
        settings={
            "lora_rank": 16,
            "lora_alpha": 32,
            "target_modules": "all",
            "learning_rate": 3e-3,
            "warmup_steps": 10,
            "batch_size": 16,
            "num_epochs": 1,
            "max_seq_length": 192,
            "dtype": "fp32",
        },
        source="a native GPT trained on the spot; lines of this repository, code or prose",
    )


def pretrained(train: list[Sentence]):
    """A small GPT that has read the training lines of the repository, saved so that `chat` can load it."""
    torch.manual_seed(0)
    BASE.mkdir(parents=True, exist_ok=True)
    corpus = BASE / "corpus.txt"
    corpus.write_text("\n".join(s.text for s in train) + "\n")
    model = GPT(GPTConfig(vocab_size=1024, n_layer=4, n_head=4, n_embd=128, block_size=256))
    model.tokenizer = train_tokenizer([corpus], vocab_size=1024)
    config = FineTuningConfig(
        use_lora=False,
        num_epochs=20,
        max_steps=150,
        learning_rate=2e-3,
        warmup_steps=10,
        batch_size=16,
        scheduler="cosine",
        dtype="fp32",
        seed=0,
    )
    FineTuner(model, TextDataset(corpus, block_size=128), None, config).train()
    lb.save_model(model, BASE / "model")
    return model


def usable(text: str) -> bool:
    return SHORTEST <= len(text) <= LONGEST


def python_lines() -> list[Sentence]:
    """Lines of code and lines of comments and docstrings of every Python file; then the documentation's prose."""
    found: dict[str, Sentence] = {}
    for path in sorted([*ROOT.glob("llmbuilder/**/*.py"), *ROOT.glob("tests/**/*.py"), *ROOT.glob("benchmarks/*.py")]):
        source = path.read_text(encoding="utf-8")
        prose = set()
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.COMMENT or (token.type == tokenize.STRING and token.string.startswith('"""')):
                prose.update(range(token.start[0], token.end[0] + 1))
        for number, line in enumerate(source.splitlines(), 1):
            text = line.strip().strip('#" ')
            if usable(text) and not (number in prose and line.split("#")[0].strip() and "#" in line):
                found[text] = Sentence(text, int(number not in prose))
    for path in sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("*.md")]):
        for line in path.read_text(encoding="utf-8").splitlines():
            if usable(line.strip()) and line[0].isalpha():
                found[line.strip()] = Sentence(line.strip(), 0)
    return list(found.values())


def cpp_lines() -> list[Sentence]:
    found = {}
    for path in sorted([*ROOT.glob("csrc/**/*.cpp"), *ROOT.glob("csrc/**/*.h")]):
        for line in path.read_text(encoding="utf-8").splitlines():
            comment, text = line.strip().startswith("//"), line.strip().lstrip("/ ")
            if usable(text) and (comment or "//" not in line):
                found[text] = Sentence(text, int(not comment))
    return list(found.values())


def licence_lines() -> list[Sentence]:
    lines = {line.strip() for line in (ROOT / "LICENSE").read_text().splitlines()}
    return [Sentence(line, 0) for line in sorted(lines) if usable(line)]
