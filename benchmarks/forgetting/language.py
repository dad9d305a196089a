"""A sequence of language tasks, one after another: what is left of the earlier ones, and of the base model.

Tasks: the verdict on sentences rated by people, of films, then of products, then of tweets (Hutto & Gilbert 2014); then
another kind of text, the first sentence of a docstring for a name, of the standard library, split by module. Measured
after the last task:

    earlier     area under the ROC curve of the verdicts, on sentences never trained on: unlike the accuracy it does
                not count which word the model leans to. `learned` is the same when each task was new, `forgetting`
                the difference, `accuracy` the share of right verdicts at the end
    last        loss of the docstrings of modules never trained on, in nats a token
    drift       KL(base || tuned) a token, over the base model's own greedy answers to prompts that have nothing to do
                with any task

EWC, L2 and replay are for the earlier tasks, KL for the drift. Every run is the library's FineTuner, task after task.
"""

import ast
import dataclasses
import functools
import itertools
import pathlib
import random
import sys
import sysconfig
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

import llmbuilder as lb
from llmbuilder.data import TaskDataset, TextDataset, collate
from llmbuilder.data.templates import plain_conversation
from llmbuilder.finetune import FineTuner, FineTuningConfig
from llmbuilder.models import GPT, GPTConfig, chat_prompt, end_ids, generate, train_tokenizer
from llmbuilder.nn.heads import LanguageHead

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "examples" / "demo"))

import smollm2  # noqa: E402
import task as demo  # noqa: E402
from task import Sentence, Task, share  # noqa: E402

CACHE = pathlib.Path(".cache/forgetting")
DOMAINS = ("film", "amazon", "tweets")
METHODS = ("none", "ewc", "l2", "replay", "kl")
GENERAL = ("ewc", "kl")  # look back on text of the base model
KINDS = ("lora", "full")
ANSWER = 16  # tokens of the base model's answer to an unrelated prompt
EWC = {"continual_learning": True, "regularization_method": "ewc"}
L2 = {"continual_learning": True, "regularization_method": "l2"}
GRID: dict[str, list[dict[str, Any]]] = {
    "ewc": [
        *(EWC | {"regularization_strength": strength} for strength in (3.0, 10.0, 30.0, 100.0)),
        # online: the past fades, the base model first of all
        *(EWC | {"regularization_strength": strength, "fisher_decay": 0.1} for strength in (30.0, 100.0, 300.0)),
    ],
    "l2": [L2 | {"regularization_strength": strength} for strength in (0.001, 0.01, 0.1)],
    "replay": [
        {"continual_learning": True, "memory_buffer_size": 500, "replay_frequency": frequency}
        for frequency in (0.25, 0.5, 0.75)
    ],
    "kl": [{"preserve_general_knowledge": True, "domain_weight": weight} for weight in (0.95, 0.9)],
}
# With so few examples a task, such shares are three and seven general texts. Searched with LoRA alone (one seed, two
# shares: an hour of a core), and the choice taken over where all weights train.
GRID_KL = {"smollm2": [{"preserve_general_knowledge": True, "domain_weight": weight} for weight in (0.9, 0.75)]}


@dataclasses.dataclass(frozen=True)
class Scale:
    """What differs between the native model and SmolLM2."""

    instruction: str
    words: tuple[str, str]
    train: int  # examples of a task, where there are so many
    held_out: int
    epochs: int
    batch_size: int
    general_tokens: int  # of the base model's own text, for the methods that want some
    settings: dict[str, dict[str, Any]]  # by kind


SCALES = {
    "native": Scale(
        instruction="good or bad?",
        words=("good", "bad"),  # words that it has read
        train=1600,
        held_out=480,
        epochs=2,
        batch_size=16,
        general_tokens=16384,
        settings={
            "lora": {"use_lora": True, "lora_rank": 16, "target_modules": "all", "learning_rate": 3e-3},
            "full": {"use_lora": False, "learning_rate": 2e-3},
        },
    ),
    "smollm2": Scale(
        instruction="Is this sentence positive or negative? Answer with one word.",
        words=("positive", "negative"),
        train=64,
        held_out=60,
        epochs=1,
        batch_size=4,
        general_tokens=4096,
        settings={
            "lora": {"use_lora": True, "lora_rank": 16, "target_modules": "all", "learning_rate": 1e-3},
            "full": {"use_lora": False, "learning_rate": 1e-4},
        },
    ),
}
COMMON = {
    "warmup_steps": 5,
    "max_seq_length": 128,
    "dtype": "fp32",
    "eval_every": None,
}


PANELS = {
    "earlier": "AUC of the verdicts at the end",
    "last": "loss of the docstrings (nats a token)",
    "drift": "drift on unrelated prompts (nats a token)",
}


def grid(name: str) -> dict[str, list[dict[str, Any]]]:
    """The settings that a search tries, by method."""
    return GRID | {"kl": GRID_KL.get(name, GRID["kl"])}


def is_matched(last: float, plain: float) -> bool:
    """Whether the last task is learnt as well as by plain training: within 2 % of its loss."""
    return last <= 1.02 * plain


def measure(name: str, kind: str, method: str, settings: dict[str, Any], seed: int, small: bool) -> dict[str, float]:
    """The measures of one sequence of tasks."""
    scale, model = SCALES[name], base(name)
    if small:
        scale = dataclasses.replace(scale, train=32, held_out=20, epochs=1)
    unrelated, before = said_before(name)
    stages = tasks(scale, seed)
    previous, learned = None, []
    common = COMMON | {"num_epochs": scale.epochs, "batch_size": scale.batch_size, "seed": seed}
    if method in GENERAL:
        common["general_tokens"] = scale.general_tokens
    config = FineTuningConfig(**common, **scale.settings[kind], **settings)
    for data, held_out in stages:
        judged = messages_of(held_out[:8], scale)  # for the tuner's own log
        tuner = FineTuner(model, messages_of(data, scale), judged, config, continue_from=previous)
        tuner.train()
        previous = tuner
        if isinstance(held_out[0], Sentence):
            learned.append(scores(tuner, held_out, scale).auc)
    ended = [scores(previous, held_out, scale) for _, held_out in stages[:-1]]
    after = log_probabilities(model, unrelated)
    earlier, new = (float(np.mean(aucs)) for aucs in ([each.auc for each in ended], learned))
    return {
        "earlier": earlier,
        "learned": new,
        "forgetting": new - earlier,
        "accuracy": float(np.mean([each.accuracy for each in ended])),
        "last": loss(previous, stages[-1][1], scale),
        "drift": float(F.kl_div(after, before, reduction="sum", log_target=True) / len(before)),
    }


def scores(tuner: FineTuner, held_out: list[Sentence], scale: Scale) -> demo.Scores:
    """Of verdicts, by the likelier word."""
    return demo.score(verdicts(tuner.model, scale), held_out)


def loss(tuner: FineTuner, held_out: list[tuple[str, str]], scale: Scale) -> float:
    """Of docstrings, in nats a token."""
    data = messages_of(held_out, scale)
    tuner.loader.bind(data)
    return tuner.judge.score(data).loss


# The tasks


def tasks(scale: Scale, seed: int) -> list[tuple[list, list]]:
    """What to train on and what to test on, by task, in their order."""
    stages = []
    for domain in DOMAINS:
        known, unknown = sentences(domain)
        stages.append((drawn(known, scale.train, seed), drawn(unknown, scale.held_out, seed)))
    draw = random.Random(seed)
    known, unknown = apart(docstrings(), key=lambda pair: pair[0].split(".")[0])
    train = draw.sample(known, min(scale.train, len(known)))
    return [*stages, (train, draw.sample(unknown, min(scale.held_out, len(unknown))))]


def apart(rows: list[Any], key: Callable[[Any], str]) -> tuple[list[Any], list[Any]]:
    """What is trained on and what is held out, by a hash of the key: the same at every seed and for every model."""
    return [row for row in rows if share(key(row)) >= 0.3], [row for row in rows if share(key(row)) < 0.3]


@functools.cache
def sentences(domain: str) -> tuple[list[Sentence], list[Sentence]]:
    """What people rated, apart."""
    smollm2.RATINGS.update(tweets="tweets_GroundTruth.txt", news="nytEditorialSnippets_GroundTruth.txt")
    return apart(smollm2.sentences(domain), key=lambda sentence: sentence.text)


def drawn(sentences: list[Sentence], count: int, seed: int) -> list[Sentence]:
    """As many of each label, in random order: ``count`` in all, or all that there are of the rarer one, twice."""
    draw = random.Random(seed)
    by_label = [[s for s in sentences if s.label == label] for label in (0, 1)]
    each = min(count // 2, *map(len, by_label))
    chosen = [s for labelled in by_label for s in draw.sample(labelled, each)]
    return draw.sample(chosen, len(chosen))


@functools.cache
def docstrings() -> list[tuple[str, str]]:
    """(module.name, first sentence) of every function and class of the standard library that says what it is."""
    found = []
    for path in library():
        module = path.stem
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                first = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split()).split(". ")[0].rstrip(".")
                if 15 <= len(first) <= 120:
                    found.append((f"{module}.{node.name}", first + "."))
    return sorted(set(found))


def library() -> list[pathlib.Path]:
    """The modules of the standard library that are files in its top folder, and parse."""
    return sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))


def messages_of(rows: list, scale: Scale) -> TaskDataset:
    if isinstance(rows[0], Sentence):
        task = verdicts(None, scale)
        return task.dataset(rows)
    chats = [
        [{"role": "user", "content": f"What is {name}?"}, {"role": "assistant", "content": text}] for name, text in rows
    ]
    return TaskDataset([{"messages": chat} for chat in chats], demo.KIND)


def verdicts(model: Any, scale: Scale) -> Task:
    return Task(model, scale.instruction, scale.words, [], {}, [], {"max_seq_length": COMMON["max_seq_length"]})


# Prompts that have nothing to do with the tasks


def prompts(name: str) -> list[str]:
    """At least 100 short ones: questions for the chat model, beginnings of lines for the one that read code."""
    if name == "native":
        lines = sorted({line.strip() for line in corpus().splitlines() if 20 <= len(line.strip()) <= 60})
        return [line[:12] for line in random.Random(0).sample(lines, 120)]
    return [template.format(word.replace("_", " ")) for template, words in QUESTIONS.items() for word in words.split()]


QUESTIONS = {
    "What is the capital of {}?": "France Italy Spain Japan China Egypt Greece Norway Poland Peru Kenya Cuba India "
    "Canada Austria Portugal Sweden Finland Turkey Mexico",
    "What is the opposite of {}?": "hot big fast light early happy strong full open rich young dry soft high near "
    "loud clean deep wide safe",
    "What colour is {}?": "grass snow blood coal gold milk chocolate ivory rust sand",
    "Name one thing that a {} needs.": "baker painter farmer pilot nurse gardener sailor tailor carpenter teacher",
    "Write one sentence about {}.": "the_sea a_dog rain bread winter music the_moon a_bridge tea a_forest",
    "How do you say '{}' in French?": "hello thanks water bread house friend night morning book cat",
    "Which animal is larger, a {} or a mouse?": "cow cat horse whale bear wolf lion camel goat sheep",
    "What do people do with a {}?": "hammer pen cup chair knife broom lamp ladder rope bucket",
    "Spell the word {} backwards.": "cat dog sun pen map net top bus red tip",
}


@functools.cache
def said_before(name: str) -> tuple[list[dict[str, list[int]]], torch.Tensor]:
    """The base model's answers, and its log probabilities of every token there; once a process."""
    model = base(name)
    examples = answered(model, prompts(name))
    return examples, log_probabilities(model, examples)


@torch.no_grad()
def answered(model: Any, texts: list[str]) -> list[dict[str, list[int]]]:
    """Each prompt with the model's own greedy answer, as an example whose targets are the answer."""
    tokenizer = model.tokenizer
    chats = tokenizer.chat_template is not None
    ids = [
        chat_prompt(tokenizer, [{"role": "user", "content": text}])
        if chats
        else tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in texts
    ]
    answers = [generate(model, [prompt], ANSWER, stop_ids=end_ids(model))[0] for prompt in ids]
    return [
        {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}
        for prompt, answer in zip(ids, answers, strict=True)
        if answer
    ]


@torch.no_grad()
def log_probabilities(model: Any, examples: list[dict[str, list[int]]]) -> torch.Tensor:
    """[n, V] in fp32, of every token of the answers."""
    head = LanguageHead(model.eval())
    batches = (collate(examples[at : at + 8]) for at in range(0, len(examples), 8))
    return torch.cat([head.target_logits(batch)[0].log_softmax(-1) for batch in batches])


# Models


def base(name: str) -> Any:
    """SmolLM2, or a native GPT that has read the standard library's code, made once."""
    if name == "smollm2":
        smollm2.model()
        return lb.load_model(smollm2.CACHE / "smollm2", dtype="fp32")
    folder = CACHE / "native"
    if not folder.exists():
        pretrain(folder)
    return lb.load_model(folder)


def pretrain(folder: pathlib.Path) -> None:
    """Full training from random weights, on code, on the tasks' sentences without what people said of them, and on
    verdicts of another domain, news: a model that has seen neither an end token nor a verdict learns none by adapters.
    """
    CACHE.mkdir(parents=True, exist_ok=True)
    text = CACHE / "corpus.txt"
    read = [s.text for domain in DOMAINS for s in sentences(domain)[0]]
    text.write_text("\n".join([corpus(), *read]))
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=2048, n_layer=2, n_head=4, n_embd=128, block_size=256))
    model.tokenizer = train_tokenizer([text], vocab_size=2048)
    end, task = model.tokenizer.eos_token, verdicts(None, SCALES["native"])
    chats = [plain_conversation(task.messages(s.text, s.label), end).text for s in sentences("news")[0]]
    pieces = 2 * [sentence + end + "\n" for sentence in read] + 3 * chats
    random.Random(0).shuffle(pieces)
    text.write_text(corpus() + "\n" + "".join(pieces))
    config = FineTuningConfig(
        use_lora=False,
        num_epochs=4,
        batch_size=16,
        learning_rate=4e-3,
        warmup_ratio=0.05,
        max_seq_length=128,
        validation_split=0.02,
        eval_every=None,
        dtype="fp32",
    )
    FineTuner(model, TextDataset(text, block_size=128), config=config).train()
    lb.save_model(model, folder)


def corpus() -> str:
    """The code of a part of the standard library, which no docstring of the task is from."""
    return "\n".join(path.read_text(encoding="utf-8") for path in itertools.islice(_code(), 60))


def _code() -> Iterator[pathlib.Path]:
    folder = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for package in ("asyncio", "email", "http", "json", "logging", "multiprocessing", "unittest", "xml", "importlib"):
        yield from sorted((folder / package).rglob("*.py"))
