"""docs/fine-tuning.md: every block runs as written and trains; every keyword in it moves what its row says it does."""

import ast
import dataclasses
import itertools
import random
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import llmbuilder as lb
from llmbuilder.cli import main
from llmbuilder.data import ChatDataset, MultiTaskDataset, TaskDataset, TextDataset
from llmbuilder.finetune import FineTuner, FineTuningConfig, loader, sampler
from llmbuilder.finetune.settings import rows
from llmbuilder.models import GPT, GPTConfig, byte_tokenizer
from llmbuilder.nn.lora import Update

PAGE = (Path(__file__).parents[1] / "docs" / "fine-tuning.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
pytestmark = pytest.mark.filterwarnings(
    "ignore:no validation data", "ignore:no general_dataset", "ignore:the embedding"
)

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "some", "cats", "near", "it", "while", "rain", "fell"]
QUESTIONS = "Question: What sat?\nAnswer: The cat.\n\nQuestion: On what?\nAnswer: The mat.\n\n"
CODE = "def add(a, b):\n    total = a + b\n    return [total, 'sum']\n\n"
TURNS = "How are you?<turn>Fine, and you?<turn>So so.<turn>I see."


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def make_model(**shape: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        plain = {"vocab_size": 258, "n_layer": 5, "n_head": 2, "n_embd": 16, "block_size": 2048}
        model = GPT(GPTConfig(**plain | shape))
    model.tokenizer = byte_tokenizer()
    return model


def sentences(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(count))


def text(seed: int = 0, words: int = 80, block_size: int = 24) -> TextDataset:
    return TextDataset([{"text": sentences(words, seed)}], block_size=block_size)


def tasks() -> MultiTaskDataset:
    summaries = TaskDataset([{"document": sentences(3, n), "summary": "cats"} for n in range(3)], "summarization")
    questions = TaskDataset([{"text": QUESTIONS}], "question_answering")
    parts = [("qa", questions, 0.4), ("summarization", summaries, 0.3), ("generation", text(), 0.3)]
    return MultiTaskDataset(parts)


def data_for(config: FineTuningConfig) -> Any:
    """Data of the kind that the settings are about."""
    if config.multi_task:
        return tasks()
    if config.dialogue_format:
        return ChatDataset([{"text": TURNS} for _ in range(6)])
    if config.task_type == "question_answering":
        return TaskDataset([{"text": QUESTIONS}], "question_answering")
    if config.code_language:
        return TextDataset([{"text": CODE} for _ in range(6)], block_size=128)
    return text()


# The blocks


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    path = tmp_path_factory.mktemp("guide")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(path)
        (path / "pretrained_model").mkdir()
        lb.save_model(make_model(n_layer=1), path / "pretrained_model" / "model.pt")
        (path / "domain_data.txt").write_text(sentences(40))
        yield path


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What the page's blocks leave behind for each other, and the data that it takes as given."""
    given = {"train_dataset": text(), "val_dataset": text(1), "gen_dataset": text()}
    data = tasks()
    return given | {"qa_dataset": data.tasks["qa"], "sum_dataset": data.tasks["summarization"]}


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_every_block_runs_as_written_and_trains(number: int, folder: Path, names: dict[str, Any]) -> None:
    """In the order of the page, each on what those before have left; a block's settings then train some steps."""
    before = names.get("config")
    if "trainer = " in BLOCKS[number]:
        names["config"] = FineTuningConfig(max_steps=2)
        before = names["config"]
    exec(compile(BLOCKS[number], f"block {number}", "exec"), names)
    config = names.get("config")
    if config is None or config is before:
        assert {"LoRAConfig", "trainer"} & set(names) or "eval_results" in names
        return
    short = FineTuningConfig(**config.resolved() | {"max_steps": 2, "general_tokens": 200})
    model = make_model()
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    tuner = FineTuner(model, data_for(short), None if short.validation_split else data_for(short), short)
    results = tuner.train()
    trained = [w for name, w in tuner.trained.items() if name not in start or not torch.equal(w, start[name])]
    assert results.steps == 2 and trained


def test_the_page_has_the_blocks_that_it_should(names: dict[str, Any]) -> None:
    assert len(BLOCKS) == 19 and len(KEYWORDS) > 55
    assert names["results"].training_time and names["eval_results"].tokens


def test_the_command_runs_as_written(folder: Path) -> None:
    (command,) = re.findall(r"^```bash\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    words = shlex.split(command.replace("\\\n", " "))
    assert words[0] == "llmbuilder" and main(words[1:]) == 0
    assert (folder / "finetuned_model" / "adapter").is_dir()


# The keywords


def keywords() -> list[str]:
    """Every setting that the page's blocks give to a FineTuningConfig, and to a LoRAConfig, as ``lora_config.*``."""
    found = {}
    for block in BLOCKS:
        for call in ast.walk(ast.parse(block)):
            if isinstance(call, ast.Call) and isinstance(call.func, ast.Name):
                prefix = {"FineTuningConfig": "", "LoRAConfig": "lora_config."}.get(call.func.id)
                if prefix is not None:
                    found |= {f"{prefix}{keyword.arg}": None for keyword in call.keywords}
    return list(found)


KEYWORDS = keywords()


@dataclasses.dataclass
class Seen:
    """What a run lets one see."""

    tuner: FineTuner
    folder: Path
    start: dict[str, torch.Tensor]
    batches: list[Any]
    by_epoch: list[dict[str, torch.Tensor]]
    loads: list[dict[str, Any]]
    saved: int

    @property
    def history(self) -> list[dict[str, Any]]:
        return self.tuner.results.history  # type: ignore[attr-defined]

    def column(self, name: str) -> list[Any]:
        return [row[name] for row in self.history if name in row]

    def end(self) -> dict[str, torch.Tensor]:
        return {name: weight.detach() for name, weight in self.tuner.model.named_parameters()}

    def moved(self) -> set[str]:
        """Names of the base model's weights that are not what they were, adapters' update in them counted."""
        end = {name.replace(".base.", "."): weight for name, weight in self.end().items()}
        return {name for name, weight in self.start.items() if not torch.equal(weight, end[name][: len(weight)])}

    def adapters(self) -> dict[str, Update]:
        return {name: m for name, m in self.tuner.model.named_modules() if isinstance(m, Update)}

    def drift(self) -> float:
        """How far the weights went from where they started."""
        end = self.end()
        return sum(float((end[name] - weight).pow(2).sum()) for name, weight in self.start.items() if name in end)


def run(folder: Path, general: bool = False, val: bool = True, **settings: Any) -> Seen:
    """A short run with its observables; of two tasks where the settings are about what comes after one."""
    plain: dict[str, Any] = {"learning_rate": 1e-2, "num_epochs": 1, "batch_size": 4, "device": "cpu"}
    plain |= {"weight_decay": 0.0, "max_grad_norm": None, "max_seq_length": 48, "general_tokens": 200}
    if "unfreeze_schedule" in settings or "learning_rate_schedule" in settings:
        del plain["num_epochs"], plain["learning_rate"]
    config = FineTuningConfig(**plain | {"output_dir": folder} | settings)
    model, loads, batches, epochs, saved = make_model(n_layer=2, block_size=64, dropout=0.1), [], [], [], [0]
    earlier = None
    if config.continual_learning:
        first = FineTuningConfig(**config.resolved() | {"output_dir": None, "max_steps": 1})
        earlier = FineTuner(model, text(5), text(1), first)
        earlier.train()
    start = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def loading(*arguments: Any, **options: Any) -> Any:
        loads.append(options)
        return load(*arguments, **options)

    def step(self: FineTuner, window: Any) -> Any:
        batches.extend(({n: t.clone() for n, t in batch.tensors.items()}, list(batch.keys)) for batch in window)
        epochs.append((self.progress.epoch, {n: w.detach().clone() for n, w in self.model.named_parameters()}))
        return taken(self, window)

    def packed(tensor: torch.Tensor) -> torch.Tensor:
        saved[0] += tensor.nbytes
        return tensor

    load, taken = loader.load_batches, FineTuner._step
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "load_batches", loading)
        patch.setattr(FineTuner, "_step", step)
        data = text(1) if general else None
        used = config.domain_weight is not None
        tuner = FineTuner(
            *(model, data_for(config), data_for(config) if val else None, config),
            **({"general_dataset": data} if general and used else {}),
            **({"continue_from": earlier} if earlier else {}),
        )
        with torch.autograd.graph.saved_tensors_hooks(packed, lambda tensor: tensor):
            tuner.results = tuner.train()  # type: ignore[attr-defined]
    first_of_epoch = dict(reversed(epochs))
    return Seen(tuner, folder, start, batches, list(first_of_epoch.values()), loads, saved[0])


def ids(seen: Seen) -> list[Any]:
    return [tensors["input_ids"].tolist() for tensors, _ in seen.batches]


def labels(seen: Seen) -> list[Any]:
    return [tensors["labels"].tolist() for tensors, _ in seen.batches]


def weights(seen: Seen) -> list[Any]:
    return [weight.tolist() for weight in seen.end().values()]


def trainable(seen: Seen) -> list[str]:
    return sorted(seen.tuner.trained)


def shares(seen: Seen) -> dict[str, int]:
    sources = [source for _, keys in seen.batches for source, _ in keys]
    return {source: sources.count(source) for source in sources}


def training_output(seen: Seen) -> bool:
    """Whether the trained model says the same thing twice in training mode."""
    model = seen.tuner.model.train()
    torch.manual_seed(0)
    first, second = (model(torch.arange(20)[None]).logits.detach() for _ in range(2))
    return bool(torch.equal(first, second)), seen.tuner.config.dropout_rate, [u.p for u in seen.adapters().values()]  # type: ignore[return-value]


def files(seen: Seen) -> list[str]:
    return sorted(str(path.relative_to(seen.folder)) for path in seen.folder.rglob("*") if "step-" not in path.name)


def past(seen: Seen) -> Any:
    return sorted((seen.folder / "past").rglob("*")), seen.tuner._past.methods.keys()


def changed_by_epoch(seen: Seen) -> list[list[str]]:
    states = [*seen.by_epoch, seen.end()]
    return [[n for n in a if not torch.equal(a[n], b[n])] for a, b in itertools.pairwise(states)]


# By what a row says it is seen by: how to see it.
OBSERVABLES: dict[str, Callable[[Seen], Any]] = {
    "epochs in metrics.jsonl": lambda seen: seen.column("epoch")[-1],
    "lr in metrics.jsonl": lambda seen: seen.column("lr"),
    "batch shapes": lambda seen: [len(rows) for rows in ids(seen)],
    "gradients equal one big batch": lambda seen: len(seen.batches) / len(seen.history),
    "trainable names": trainable,
    "bits of the weights": lambda seen: sorted(seen.moved()),
    "shapes of A and B": lambda seen: [[*A.shape] for u in seen.adapters().values() for A in u.lora_A.values()],
    "scale": lambda seen: [u.scaling for u in seen.adapters().values()],
    "outputs in training": training_output,
    "parameter groups": lambda seen: sorted(group["weight_decay"] for group in seen.tuner.optimizer.param_groups),
    "weights after a step equal torch's": weights,
    "grad_norm and the weights": weights,
    "steps in metrics.jsonl": lambda seen: [row["step"] for row in seen.history if "eval_loss" in row],
    "checkpoints/step-N": lambda seen: sorted(path.name for path in (seen.folder / "checkpoints").iterdir()),
    "last step, weights": lambda seen: (seen.tuner.results.steps, seen.tuner.results.best_step),  # type: ignore[attr-defined]
    "sizes": lambda seen: (len(seen.tuner.run.sources["train"]), seen.tuner.results.evaluated_on),  # type: ignore[attr-defined]
    "prompts, metrics": lambda seen: ids(seen)[0][0][:30],
    "report": lambda seen: max(len(row) for rows in ids(seen) for row in rows),
    "loss equal, rows fewer": lambda seen: [len(rows) for rows in ids(seen)],
    "mask": lambda seen: (labels(seen), ids(seen)),
    "turns": ids,
    "turns, report": ids,
    "gradients equal, memory": lambda seen: seen.saved,
    "workers": lambda seen: [options["workers"] for options in seen.loads],
    "extra_loss in metrics.jsonl, past/": lambda seen: (seen.column("extra_loss") != [], past(seen)[1]),
    "extra_loss in metrics.jsonl, weights": lambda seen: (seen.column("extra_loss"), weights(seen)),
    "drift of the weights": lambda seen: seen.drift(),
    "examples in past/": lambda seen: len(seen.tuner._past.methods["replay"]["examples"]),
    "shares of the examples": shares,
    "forgetting in results.json": lambda seen: seen.tuner.results.forgetting,  # type: ignore[attr-defined]
    "results.json, name of the cached general text": lambda seen: seen.tuner.results.domain,  # type: ignore[attr-defined]
    "which weights changed in which epoch": changed_by_epoch,
    "loss, gradients": lambda seen: seen.column("loss"),
    "gradients": weights,
    "files": files,
    "files, gradients": files,
    "token ids, bits of the old rows": lambda seen: len(seen.tuner.model.tokenizer),
    "examples": lambda seen: ids(seen),
}

LORA = {"lora_rank": 2, "lora_target_modules": "all"}
EWC = {"continual_learning": True, "regularization_method": "ewc"}
REPLAY = {"continual_learning": True, "memory_buffer_size": 1000, "replay_frequency": 0.1}
STAGES = {"progressive_unfreezing": True, "unfreeze_schedule": [(0, 1), (1, -1)]}
CHAT = {"dialogue_format": True, "turn_separator": "<turn>"}
# The settings that a keyword stands among, and two values of it; what is seen must differ between these.
CASES: dict[str, tuple[dict[str, Any], Any, Any]] = {
    "num_epochs": ({}, 1, 2),
    "learning_rate": ({}, 5e-5, 1e-4),
    "batch_size": ({}, 8, 2),
    "use_lora": ({}, True, False),
    "lora_rank": (LORA, 3, 2),
    "lora_alpha": (LORA, 32, 4),
    "lora_dropout": (LORA, 0.1, 0.0),
    "lora_target_modules": ({}, ["attention", "mlp"], ["attention"]),
    "target_modules": ({}, "all", ["attention"]),
    "lora_config": ({}, {"target_modules": "mlp"}, {"target_modules": "attention"}),
    "weight_decay": ({}, 0.01, 0.1),
    "warmup_steps": ({}, 100, 1),
    "warmup_ratio": ({}, 0.9, 0.0),
    "min_lr_ratio": ({"batch_size": 1}, 0.1, 0.0),
    "scheduler": ({"batch_size": 1}, "cosine", "linear"),
    "adaptation_method": ({"general": True}, "domain", None),
    "domain_weight": ({"general": True}, 0.7, 0.5),
    "domain": ({"general": True}, "medical", None),
    "preserve_general_knowledge": ({"general": True, "domain_weight": 0.5}, True, False),
    "regularization_strength": ({"adaptation_method": "domain", "general": True, "optimizer": "sgd"}, 0.1, 0.0),
    "regularization_method": ({"continual_learning": True, "regularization_strength": 9.0}, "ewc", "l2"),
    "freeze_embeddings": ({}, True, False),
    "freeze_layers": ({}, 1, 0),
    "dropout_rate": ({}, 0.1, 0.2),
    "eval_every": ({"batch_size": 1}, 2, 100),
    "save_every": ({"batch_size": 1}, 2, 500),
    "early_stopping_patience": ({"batch_size": 1, "learning_rate": 1e4, "eval_every": 1}, 1, None),
    "validation_split": ({"val": False}, 0.2, 0.0),
    "max_seq_length": ({}, 24, 12),
    "data_collator": ({}, "packing", "default"),
    "optimizer": ({}, "adamw", "sgd"),
    "gradient_accumulation_steps": ({"batch_size": 1}, 4, 1),
    "max_grad_norm": ({"optimizer": "sgd"}, 0.1, None),
    "gradient_checkpointing": ({}, True, False),
    "dataloader_num_workers": ({}, 1, 0),
    "task_type": ({}, "question_answering", "language_modeling"),
    "style_adaptation": ({}, True, False),
    "preserve_factual_knowledge": ({}, True, False),
    "progressive_unfreezing": ({}, True, False),
    "unfreeze_schedule": ({"progressive_unfreezing": True}, [(0, 1), (1, -1)], [(0, 2), (1, -1)]),
    "learning_rate_schedule": ({}, [(0, 1e-5), (1, 3e-5)], [(0, 1e-5), (1, 5e-5)]),
    "multi_task": ({}, True, False),
    "task_weights": ({"multi_task": True}, {"qa": 1.0, "summarization": 0.1}, {"qa": 1.0}),
    "shared_encoder": ({"multi_task": True, "lora_rank": 2}, True, False),
    "task_specific_heads": ({"multi_task": True}, True, False),
    "continual_learning": ({}, True, False),
    "memory_buffer_size": ({"continual_learning": True, "replay_frequency": 0.5}, 1, 1000),
    "replay_frequency": ({"continual_learning": True, "memory_buffer_size": 1000}, 0.1, 0.5),
    "special_tokens": ({"lora_rank": 2}, ["<code>", "</code>", "<comment>"], None),
    "code_specific_loss": (
        {"code_language": "python", "syntax_aware_training": True, "max_seq_length": 64},
        True,
        False,
    ),
    "syntax_aware_training": (
        {"code_language": "python", "code_specific_loss": True, "max_seq_length": 64},
        True,
        False,
    ),
    "dialogue_format": ({"max_seq_length": 64}, True, False),
    "turn_separator": ({"dialogue_format": True, "max_seq_length": 64}, "<turn>", "<tur"),
    "response_loss_only": (CHAT | {"max_seq_length": 64}, True, False),
    "max_turns": (CHAT | {"max_seq_length": 64}, 2, 10),
    "preserve_base_capabilities": ({"optimizer": "sgd"}, True, False),
    "validation_on_base_tasks": ({}, True, False),
}
ALIASES = {f"lora_config.{field}": f"lora_{field}" for field in ("rank", "alpha", "dropout", "target_modules")}
EXTRA: dict[str, dict[str, Any]] = {  # what one of the values needs besides
    "progressive_unfreezing": {"unfreeze_schedule": [(0, 1), (1, -1)]},
    "dialogue_format": {"turn_separator": "<turn>"},
}
ELSEWHERE = {"dataloader_pin_memory"}


@pytest.mark.parametrize("keyword", [name for name in KEYWORDS if name not in ELSEWHERE])
def test_every_keyword_moves_what_its_row_says(keyword: str, tmp_path: Path) -> None:
    setting = ALIASES.get(keyword, keyword)
    around, given, other = CASES[setting]
    see = OBSERVABLES[rows()[setting].observable]
    seen = []
    for number, value in enumerate((given, other)):
        settings = around | {name: value} if (name := setting) else {}
        settings |= EXTRA.get(setting, {}) if value is True else {}
        if keyword in ALIASES:
            config = {keyword.partition(".")[2]: settings.pop(setting)}
            settings = {name: v for name, v in settings.items() if name not in LORA} | {"lora_config": config}
        if setting == "regularization_strength":
            settings["max_steps"] = 40
        seen.append(see(run(tmp_path / f"run {number}", **settings)))
    assert seen[0] != seen[1], f"{keyword}: {rows()[setting].observable} does not move"
    if setting == "regularization_strength":
        assert seen[0] < seen[1]


def test_dataloader_pin_memory_reaches_the_loader_of_a_gpu_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """There may be no GPU here: a model whose weights say that they are on one will do."""
    pins: list[bool] = []
    monkeypatch.setattr(loader, "load_batches", lambda *_, pin_memory, **__: pins.append(pin_memory) or iter(()))
    for value in (True, False):
        model = make_model(n_layer=1)
        made = loader.Loader(model, FineTuningConfig(dataloader_pin_memory=value))
        cuda = type("Weight", (), {"device": torch.device("cuda")})
        monkeypatch.setattr(model, "parameters", lambda cuda=cuda: iter([cuda]))
        made.batches({"train": []}, [])
    assert pins == [True, False] and sampler.load_batches is not None


def test_every_keyword_of_the_page_has_a_case() -> None:
    settings = {ALIASES.get(keyword, keyword) for keyword in KEYWORDS}
    assert settings - ELSEWHERE == set(CASES) - {"lora_dropout", "lora_alpha"} | (
        settings & {"lora_dropout", "lora_alpha"}
    )
    assert settings <= set(rows())
