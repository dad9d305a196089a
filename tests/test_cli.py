"""The command line from outside: what it prints, what it writes, how it refuses, and that it does what the API does."""

import io
import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import llmbuilder as lb
from llmbuilder.cli import COMMANDS, main
from llmbuilder.data import load_dataset
from llmbuilder.finetune import FineTuner, FineTuningConfig
from llmbuilder.finetune.judge import Judge
from llmbuilder.finetune.loader import Loader
from llmbuilder.finetune.settings import rows
from llmbuilder.models import GPT, GPTConfig, byte_tokenizer, end_ids, generate
from llmbuilder.nn import load_adapter, load_heads, use_head

TEXT = "The cat sat on the mat. The dog sat on the log. " * 20
RUN_SETTINGS = {
    "num_epochs": 2,
    "learning_rate": 0.01,
    "batch_size": 4,
    "max_seq_length": 32,
    "lora_rank": 4,
    "lora_dropout": 0.1,
    "lora_target_modules": "all",
    "validation_split": 0.2,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with a tiny native model (model/), a text (text.txt) and a chat data set (chat.jsonl)."""
    folder = tmp_path_factory.mktemp("cli")
    torch.manual_seed(0)
    model = GPT(GPTConfig(vocab_size=258, n_layer=2, n_head=2, n_embd=32, block_size=96))
    model.tokenizer = byte_tokenizer()
    lb.save_model(model, folder / "model")
    (folder / "text.txt").write_text(TEXT)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (folder / "chat.jsonl").write_text(f"{json.dumps({'messages': messages})}\n" * 3)
    (folder / "short.txt").write_text(TEXT[:100])
    (folder / "empty.txt").touch()
    (folder / "latin.txt").write_bytes(b"caf\xe9 " * 50)
    (folder / "broken.jsonl").write_text('{"messages": []}\n{"broken\n')
    (folder / "rubbish").mkdir()
    (folder / "rubbish" / "config.json").write_text("{}")
    return folder


def flags(settings: dict) -> list[str]:
    """The settings as words of a command line, each under its last flag."""
    words = []
    for name, value in settings.items():
        flag = rows()[name].flags[-1]
        many = [str(one) for one in value] if isinstance(value, list) else [str(value)]
        words += [flag if value else f"--no-{flag[2:]}"] if isinstance(value, bool) else [flag, *many]
    return words


def finetune(home: Path, *words: str) -> int:
    return main(["finetune", "model", "--model", f"{home}/model", "--dataset", f"{home}/text.txt", *words])


@pytest.fixture(scope="module")
def run(home) -> Path:
    """The folder of a finished run."""
    output = home / "run"
    assert finetune(home, "--output", str(output), *flags(RUN_SETTINGS)) == 0
    return output


def refused(capfd, words: list[str], status: int) -> str:
    """The one line that a refusal prints."""
    capfd.readouterr()
    assert main(words) == status
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("llmbuilder: ")
    return err


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


# Fine-tuning


def test_a_run_leaves_what_it_promises(run):
    assert {path.name for path in run.iterdir()} >= {
        *("adapter", "checkpoints", "metrics.jsonl", "config.yaml", "results.json", "loss.png")
    }
    results = json.loads((run / "results.json").read_text())
    assert results["final_perplexity"] < results["base_perplexity"]
    assert FineTuningConfig.from_yaml(run / "config.yaml") == FineTuningConfig(**RUN_SETTINGS, output_dir=run)


def test_the_command_line_trains_as_the_api_does_bit_for_bit(home, run):
    model = lb.load_model(home / "model")
    config = FineTuningConfig(**RUN_SETTINGS, output_dir=home / "api")
    results = lb.finetune_model(model, load_dataset(home / "text.txt", config), config)
    mine, theirs = tensors(home / "api" / "adapter"), tensors(run / "adapter")
    assert mine.keys() == theirs.keys() and len(mine) > 0
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert any(mine[name].any() for name in mine if "lora_B" in name)
    assert results.final_perplexity == json.loads((run / "results.json").read_text())["final_perplexity"]


@pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "all weights"])
def test_continue_from_trains_as_the_api_does_bit_for_bit(home, tmp_path, lora):
    """Weights, optimizer, Fisher information, anchors and buffer; without the earlier run they come out otherwise."""
    settings = RUN_SETTINGS if lora else {name: RUN_SETTINGS[name] for name in RUN_SETTINGS if "lora" not in name}
    settings = settings | {"use_lora": lora, "max_steps": 3, "general_tokens": 64, "continual_learning": True}
    settings |= {"regularization_method": "ewc", "regularization_strength": 5.0}
    settings |= {"memory_buffer_size": 3, "replay_frequency": 0.25}
    (tmp_path / "second.txt").write_text("Wer reitet so spät durch Nacht und Wind? " * 20)
    first, second = tmp_path / "first", tmp_path / "second"
    assert finetune(home, "--output", str(first), *flags(settings)) == 0
    given = ["--dataset", f"{tmp_path}/second.txt", *flags(settings)]
    assert finetune(home, *given, "--output", str(second), "--continue-from", str(first)) == 0
    assert finetune(home, *given, "--output", f"{tmp_path}/alone") == 0

    config = FineTuningConfig(**settings, output_dir=tmp_path / "api")
    data = load_dataset(tmp_path / "second.txt", config)
    FineTuner(lb.load_model(home / "model"), data, config=config, continue_from=first).train()

    def written(folder: Path) -> dict[str, torch.Tensor]:
        files = [*folder.glob("adapter/*.safetensors"), *folder.glob("model/*.safetensors")]
        files += [*(folder / "checkpoints/step-3").glob("*.safetensors"), folder / "past/methods.safetensors"]
        return {f"{path.name} {name}": tensor for path in files for name, tensor in load_file(path).items()}

    mine, theirs, alone = written(second), written(tmp_path / "api"), written(tmp_path / "alone")
    assert mine.keys() == theirs.keys() and any("fisher/" in name for name in mine)
    assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    assert any(not torch.equal(mine[name], alone[name]) for name in mine if name.startswith(("adapter", "model")))
    state, same, other = (
        json.loads((folder / "past/state.json").read_text())
        for folder in (second, tmp_path / "api", tmp_path / "alone")
    )
    assert state == same != other and len(state["tasks"]) == 2


def test_a_run_prints_its_data_its_results_and_how_to_chat(home, tmp_path, capfd):
    words = ["--output", f"{tmp_path}/a run", *flags(RUN_SETTINGS), "--max-steps", "1"]
    assert finetune(home, *words) == 0
    out = capfd.readouterr().out
    assert f"{home}/text.txt: 1 row read, 1 kept" in out
    results = json.loads((tmp_path / "a run" / "results.json").read_text())
    assert f"{results['base_perplexity']:.2f} before, {results['final_perplexity']:.2f} after" in out
    chat = shlex.split(out.splitlines()[-1])
    assert chat == ["llmbuilder", "chat", "--model", f"{home}/model", "--adapter", f"{tmp_path}/a run/adapter"]


def test_full_fine_tuning_writes_a_model_that_chats(home, tmp_path, capfd, monkeypatch):
    output = tmp_path / "run"
    words = ["--output", str(output), "--max-steps", "1", "--max-seq-length", "32", "--no-use-lora"]
    assert finetune(home, *words) == 0
    chat = shlex.split(capfd.readouterr().out.splitlines()[-1])
    assert chat == ["llmbuilder", "chat", "--model", f"{output}/model"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    assert main([*chat[1:], "--max-new-tokens", "2"]) == 0


def test_short_and_long_flags_mean_the_same(home, tmp_path):
    for output, epochs, rate in (("a", "--epochs", "--lr"), ("b", "--num-epochs", "--learning-rate")):
        words = [epochs, "7", rate, "3e-3", "--max-steps", "1", "--max-seq-length", "32"]
        assert finetune(home, "--output", f"{tmp_path}/{output}", *words) == 0
    a, b = (yaml.safe_load((tmp_path / name / "config.yaml").read_text()) for name in "ab")
    assert (a["num_epochs"], a["learning_rate"]) == (b["num_epochs"], b["learning_rate"]) == (7, 3e-3)


def test_a_flag_beats_the_file_and_the_file_the_default(home, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(
        f"batch_size: 2\nlearning_rate: 1e-3\nlora_config: {{rank: 2, bias: all}}\nmax_steps: 1\nmax_seq_length: 32\n"
        f"max_grad_norm: 0.5\noutput_dir: {tmp_path}/run\n"
    )
    words = ["--config", str(file), "--lr", "2e-3", "--lora-rank", "3", "--max-grad-norm", "none"]
    assert finetune(home, *words) == 0
    config = FineTuningConfig.from_yaml(tmp_path / "run" / "config.yaml")
    assert (config.learning_rate, config.lora_rank, config.max_grad_norm) == (2e-3, 3, None)  # flags
    assert (config.batch_size, config.lora().bias) == (2, "all")  # file
    assert config.weight_decay == FineTuningConfig().weight_decay  # default


def test_every_setting_has_a_flag_that_sets_it(home, tmp_path, monkeypatch):
    other = {
        "num_epochs": 3,
        "max_steps": 9,
        "learning_rate": 1e-3,
        "batch_size": 3,
        "gradient_accumulation_steps": 2,
        "seed": 5,
        "use_lora": True,
        "freeze_embeddings": True,
        "freeze_layers": 1,
        "lora_rank": 3,
        "lora_alpha": 5.0,
        "lora_dropout": 0.2,
        "lora_target_modules": "mlp",
        "target_modules": "mlp",
        "lora_config": "{bias: all}",
        "weight_decay": 0.1,
        "dropout_rate": 0.3,
        "optimizer": "sgd",
        "scheduler": "linear",
        "warmup_steps": 4,
        "warmup_ratio": 0.2,
        "min_lr_ratio": 0.1,
        "max_grad_norm": 2.0,
        "eval_every": 7,
        "save_every": 8,
        "early_stopping_patience": 2,
        "validation_split": 0.1,
        "task_type": "conversation",
        "max_seq_length": 77,
        "data_collator": "packing",
        "dialogue_format": True,
        "turn_separator": "<turn>",
        "response_loss_only": False,
        "max_turns": 6,
        "dtype": "bf16",
        "device": "cpu",
        "gradient_checkpointing": True,
        "dataloader_pin_memory": True,
        "dataloader_num_workers": 1,
        "output_dir": f"{tmp_path}/run",
        "continual_learning": True,
        "regularization_method": "ewc",
        "regularization_strength": 0.3,
        "fisher": "empirical",
        "fisher_decay": 0.5,
        "memory_buffer_size": 7,
        "replay_frequency": 0.2,
        "preserve_base_capabilities": True,
        "validation_on_base_tasks": True,
        "adaptation_method": "domain",
        "domain": "medical",
        "domain_weight": 0.6,
        "preserve_general_knowledge": True,
        "general_tokens": 99,
        "style_adaptation": True,
        "preserve_factual_knowledge": True,
        "progressive_unfreezing": True,
        "unfreeze_schedule": "[[0, 1], [2, -1]]",
        "learning_rate_schedule": "[[0, 0.001], [1, 0.002]]",
        "multi_task": True,
        "task_weights": "{qa: 2.0}",
        "shared_encoder": False,
        "task_specific_heads": True,
        "special_tokens": ["<a>", "<b>"],
        "code_specific_loss": True,
        "syntax_aware_training": True,
        "code_language": "python",
    }
    assert other.keys() == rows().keys()
    continual = ("regularization_method", "regularization_strength", "fisher", "fisher_decay")
    needs = {
        **{key: {"dialogue_format": True} for key in ("turn_separator", "max_turns")},
        **{key: {"continual_learning": True} for key in (*continual, "memory_buffer_size", "replay_frequency")},
        **{key: {"multi_task": True} for key in ("task_weights", "shared_encoder", "task_specific_heads")},
        "progressive_unfreezing": {"unfreeze_schedule": "[[0, 1]]"},
        "unfreeze_schedule": {"progressive_unfreezing": True},
        "code_language": {"code_specific_loss": True},
    }
    seen = []
    monkeypatch.setattr("llmbuilder.data.load_dataset", lambda path, config: seen.append(config) or [])
    for name, value in other.items():
        given = {name: value} | needs.get(name, {})
        output = [] if name == "output_dir" else ["--output", f"{tmp_path}/run"]
        assert finetune(home, *flags(given), *output) == 1, name  # there are no examples
        in_yaml = ("lora_config", "unfreeze_schedule", "learning_rate_schedule", "task_weights")
        wanted = {key: yaml.safe_load(text) if key in in_yaml else text for key, text in given.items()}
        assert seen[-1] == FineTuningConfig(**wanted | {"output_dir": f"{tmp_path}/run"}), name
        assert seen[-1] != FineTuningConfig(output_dir=f"{tmp_path}/run") or name == "output_dir", name
    assert not (tmp_path / "run").exists()


def test_a_second_run_needs_resume_or_overwrite(home, run, capfd):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    words = ["finetune", "model", "--model", f"{home}/model", "--dataset", f"{home}/text.txt"]
    told = refused(capfd, [*words, "--output", str(run), *flags(RUN_SETTINGS)], 1)
    assert str(run) in told and "resume" in told and "overwrite" in told
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}


def test_what_a_run_reads_is_not_overwritten_by_it(home, tmp_path, capfd):
    output = tmp_path / "run"
    assert (
        finetune(home, "--output", str(output), *["--no-use-lora", "--max-steps", "1", "--max-seq-length", "32"]) == 0
    )
    words = [
        "finetune",
        "model",
        "--model",
        f"{output}/model",
        "--dataset",
        f"{home}/text.txt",
        "--output",
        str(output),
    ]
    told = refused(capfd, [*words, "--use-lora", "--overwrite"], 1)
    assert f"--model {output}/model lies in {output}, which --overwrite replaces" in told
    assert (output / "model" / "config.json").exists() and (output / "results.json").exists()


def test_an_interrupted_run_says_how_to_go_on_and_then_ends_as_if_never_interrupted(
    home, run, tmp_path, capfd, monkeypatch
):
    output = tmp_path / "run"
    words = ["--output", str(output), *flags(RUN_SETTINGS), "--save-every", "3"]
    step = FineTuner._step

    def pressed(self, window):
        if self.progress.step == 5:
            raise KeyboardInterrupt
        return step(self, window)

    with monkeypatch.context() as patch:
        patch.setattr(FineTuner, "_step", pressed)
        assert finetune(home, *words) == 130
    told = capfd.readouterr().err.splitlines()[-1]
    resume = shlex.split(told.split(": ", 2)[2])
    assert resume[-1] == "--resume"
    assert not (output / "adapter").exists()
    assert main(resume[1:]) == 0
    mine, theirs = tensors(output / "adapter"), tensors(run / "adapter")
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert len((output / "metrics.jsonl").read_text().splitlines()) == len(
        (run / "metrics.jsonl").read_text().splitlines()
    )


class Struck:
    """Presses Ctrl-C while it is destroyed, where Python drops the exception."""

    def __del__(self) -> None:
        os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("then", ["goes on", "fails"])
def test_control_c_that_loading_drops_or_makes_an_error_of_ends_every_command(home, tmp_path, monkeypatch, then):
    load = lb.models.load_model

    def struck(path):
        Struck()
        if then == "fails":
            raise ImportError("half of it is there")
        return load(path)

    monkeypatch.setattr("llmbuilder.models.load_model", struck)
    assert finetune(home, "--output", f"{tmp_path}/run", *flags(RUN_SETTINGS)) == 130
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    words = ["--model", f"{home}/model"]
    for command in (["generate", "--prompt", "a"], ["evaluate", "--dataset", f"{home}/short.txt"], ["chat"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO(""))
        assert main([*command, *words]) == 130
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_resumed_run_refuses_a_changed_setting_by_name(home, run, capfd):
    words = ["finetune", "model", "--model", f"{home}/model", "--dataset", f"{home}/text.txt", "--output", str(run)]
    assert main([*words, *flags(RUN_SETTINGS | {"learning_rate": 0.02}), "--resume"]) == 1
    assert "learning_rate: 0.01 -> 0.02" in capfd.readouterr().err


# What is refused


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["finetune", "model", "--lrr", "1"], "unknown flag '--lrr'; did you mean '--lr'?"),
        (["finetune", "model", "--lora-rnk=8"], "unknown flag '--lora-rnk'; did you mean '--lora-rank'?"),
        (["finetune", "model", "--load-in-4bit"], "load_in_4bit is not yet available in this version"),
        (["finetune", "model", "--use-dora"], "use_dora is not yet available in this version"),
        (["finetune", "model", "--fsdp", "2"], "fsdp is not yet available in this version"),
        (["generate", "--model", "x", "--promt", "y"], "unknown flag '--promt'; did you mean '--prompt'?"),
        (["chta"], "unknown command 'chta'; did you mean 'chat'?"),
        (["finetune", "modle"], "unknown command 'finetune modle'; did you mean 'finetune model'?"),
    ],
)
def test_an_unknown_name_is_refused_with_the_nearest(words, told, capfd):
    assert told in refused(capfd, words, 2)


def test_an_unknown_key_of_the_file_is_refused_with_the_nearest(home, tmp_path, capfd):
    file = tmp_path / "settings.yaml"
    file.write_text("num_epoch: 3\n")
    words = [
        "finetune",
        "model",
        "--model",
        "m",
        "--dataset",
        "d",
        "--config",
        str(file),
        "--output",
        f"{tmp_path}/run",
    ]
    assert f"{file}: unknown setting 'num_epoch'; did you mean 'num_epochs'?" in refused(capfd, words, 2)


def test_a_bad_value_of_the_file_is_told_with_the_file(tmp_path, capfd):
    file = tmp_path / "settings.yaml"
    file.write_text("num_epochs: 0\n")
    words = [
        "finetune",
        "model",
        "--model",
        "m",
        "--dataset",
        "d",
        "--config",
        str(file),
        "--output",
        f"{tmp_path}/run",
    ]
    assert f"{file}: num_epochs=0 should be greater" in refused(capfd, words, 1)


TRAIN = (
    "finetune model --model {home}/model --dataset {home}/text.txt --max-seq-length 32 --validation-split 0.2 "
    "--output {output}"
)
ON = "finetune model --model {home}/model --max-seq-length 32 --output {output} --dataset {home}/"
BAD_INPUT = {
    "a value out of range": (f"{TRAIN} --lr -1", "learning_rate='-1' should be greater than 0"),
    "a word for a number": (f"{TRAIN} --epochs many", "num_epochs='many' should be"),
    "a contradiction": (f"{TRAIN} --warmup-steps 1 --warmup-ratio 0.1", "warmup_steps and warmup_ratio"),
    "no output": ("finetune model --model {home}/model --dataset {home}/text.txt", "--output is missing"),
    "no such data": (f"{ON}nothing.txt", "nothing.txt: no such file"),
    "an empty file": (f"{ON}empty.txt", "empty.txt: the file is empty"),
    "not utf-8": (f"{ON}latin.txt", "latin.txt: not utf-8 at byte 3"),
    "no usable row": (f"{ON}broken.jsonl", "broken.jsonl:2: not JSON"),
    "no such model": ("finetune model --model {home}/none --dataset {home}/text.txt --output {output}", "none"),
    "no known model": ("finetune model --model {home}/rubbish --dataset {home}/text.txt --output {output}", "rubbish"),
    "no such module": (f"{TRAIN} --target-modules atention", "atention"),
    "too many frozen layers": (f"{TRAIN} --freeze-layers 9", "freeze_layers=9"),
    "longer than the context": (f"{TRAIN} --max-seq-length 1000", "max_seq_length"),
    "no such device": (f"{TRAIN} --device abacus", "device='abacus'"),
    "no such settings": (f"{TRAIN} --config nothing.yaml", "nothing.yaml: cannot be read"),
    "a bad mapping": (f"{TRAIN} --lora-config '{{{{rank: [}}}}'", "--lora-config"),
    "resume and overwrite": (f"{TRAIN} --resume --overwrite", "contradict each other"),
    "no such adapter": ("chat --model {home}/model --adapter nothing", "nothing: no such folder"),
    "an empty prompt": ("generate --model {home}/model --prompt ''", "prompt is empty"),
    "a temperature that is none": ("generate --model {home}/model --prompt a --temperature nan", "--temperature nan"),
    "a negative temperature": ("chat --model {home}/model --temperature -1", "--temperature -1.0 should be"),
    "a seed beyond torch's": (
        f"generate --model {{home}}/model --prompt a --seed {2**64}",
        f"--seed {2**64} should be",
    ),
    "a prompt not utf-8": ("generate --model {home}/model --prompt a\udcff", "--prompt is not UTF-8 at character 1"),
    "a system message not utf-8": ("chat --model {home}/model --system \udcff", "--system is not UTF-8"),
    "too many tokens": ("generate --model {home}/model --prompt a --max-new-tokens 99", "max_new_tokens"),
    "no adapter in the folder": ("merge --model {home}/model --adapter {home}/model --output {output}", "adapter"),
    "no data to judge on": ("evaluate --model {home}/model --dataset {home}/empty.txt", "empty.txt: the file is empty"),
}


@pytest.mark.parametrize(("line", "told"), BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_is_one_line_and_nothing_is_written(line, told, home, tmp_path, capfd):
    output = tmp_path / "run"
    before = sorted(home.rglob("*"))
    assert told in refused(capfd, shlex.split(line.format(home=home, output=output)), 1)
    assert list(tmp_path.iterdir()) == [] and sorted(home.rglob("*")) == before


def test_an_error_that_nobody_foresaw_names_its_kind_and_debug_shows_where(home, monkeypatch, capfd):
    def broken(*_, **__):
        raise RuntimeError("a\nb")

    monkeypatch.setattr("llmbuilder.models.load_model", broken)
    words = ["generate", "--model", f"{home}/model", "--prompt", "a"]
    assert "RuntimeError: a b (unexpected; --debug shows where" in refused(capfd, words, 1)
    assert main([*words, "--debug"]) == 1
    assert "in broken" in capfd.readouterr().err
    monkeypatch.setenv("LLMBUILDER_DEBUG", "1")
    assert main(words) == 1
    assert "in broken" in capfd.readouterr().err


def test_warnings_are_lines_for_people(home, tmp_path, capfd):
    words = ["--output", f"{tmp_path}/run", "--max-steps", "1", "--max-seq-length", "32"]
    assert finetune(home, *words) == 0
    told = [line for line in capfd.readouterr().err.splitlines() if "no validation data" in line]
    assert len(told) == 1 and told[0].startswith("llmbuilder: warning: no validation data")


# The other commands


def test_generate_prints_the_continuation_and_nothing_else(home, run, capfd):
    words = ["generate", "--model", f"{home}/model", "--adapter", f"{run}/adapter", "--prompt", "The cat"]
    capfd.readouterr()
    assert main([*words, "--max-new-tokens", "12"]) == 0
    model = lb.load_model(home / "model")
    load_adapter(model, run / "adapter")
    (tokens,) = generate(model, [model.tokenizer("The cat")["input_ids"]], 12)
    assert capfd.readouterr().out == model.tokenizer.decode(tokens) + "\n"


def test_generate_makes_as_much_as_the_context_has_room_for(home, capfd):
    model = lb.load_model(home / "model")
    prompt = "The cat"
    room = model.config.block_size - len(model.tokenizer(prompt)["input_ids"])
    assert main(["generate", "--model", f"{home}/model", "--prompt", prompt]) == 0
    (tokens,) = generate(model, [model.tokenizer(prompt)["input_ids"]], room, stop_ids=end_ids(model))
    assert room < 128 and capfd.readouterr().out == model.tokenizer.decode(tokens, skip_special_tokens=True) + "\n"


def test_generate_draws_by_its_seed(home, capfd):
    def said(seed: int) -> str:
        words = ["--prompt", "The", "--max-new-tokens", "20", "--temperature", "1", "--seed", str(seed)]
        assert main(["generate", "--model", f"{home}/model", *words]) == 0
        return capfd.readouterr().out

    capfd.readouterr()
    assert said(1) == said(1) != said(2)


def test_the_adapter_changes_what_is_said(home, run, capfd):
    said = []
    for adapter in ([], ["--adapter", f"{run}/adapter"]):
        capfd.readouterr()
        words = ["--prompt", "The cat", "--max-new-tokens", "20"]
        assert main(["generate", "--model", f"{home}/model", *adapter, *words]) == 0
        said.append(capfd.readouterr().out)
    assert said[0] != said[1]


def test_merge_writes_a_model_that_says_the_same(home, run, tmp_path, capfd):
    output = tmp_path / "merged"
    words = ["merge", "--model", f"{home}/model", "--adapter", f"{run}/adapter", "--output", str(output)]
    assert main(words) == 0
    merged, adapted = lb.load_model(output), lb.load_model(home / "model")
    load_adapter(adapted, run / "adapter")
    ids = torch.randint(256, (2, 32))
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, adapted.eval()(ids).logits, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(merged(ids).logits, lb.load_model(home / "model")(ids).logits, atol=1e-2)
    assert "--overwrite" in refused(capfd, words, 1)
    assert main([*words, "--overwrite"]) == 0


# Tasks with a head or an adapter of their own

TASKS = {
    "heads, one adapter": {},
    "heads, all weights": {"use_lora": False},
    "an adapter each": {"shared_encoder": False},
}


@pytest.fixture(scope="module", params=TASKS)
def of_tasks(request, home) -> tuple[Path, list[str]]:
    """The folder of a run of two tasks, and the words that name what it trained."""
    folder = home / request.param
    folder.mkdir()
    for name in ("cats", "dogs"):
        (folder / f"{name}.txt").write_text(f"The {name} sat on the mat. " * 12)
    data = folder / "tasks.yaml"
    data.write_text("".join(f"- {{name: {name}, data: {name}.txt, share: 1}}\n" for name in ("dogs", "cats")))
    settings = {"use_lora": True, "multi_task": True, "learning_rate": 0.05, "max_seq_length": 16, "max_steps": 4}
    settings |= TASKS[request.param]
    settings |= {} if "shared_encoder" in settings else {"task_specific_heads": True}
    assert finetune(home, "--dataset", str(data), "--output", f"{folder}/run", *flags(settings)) == 0
    name = "model" if settings["use_lora"] is False else "adapters" if "shared_encoder" in settings else "adapter"
    words = ["--model", f"{folder}/run/model"] if name == "model" else ["--model", f"{home}/model", "--adapter"]
    return folder, words if name == "model" else [*words, f"{folder}/run/{name}"]


@pytest.mark.parametrize("task", ["cats", "dogs"])
def test_task_serves_what_a_task_has_of_its_own(of_tasks, task, home, capfd):
    """As loaded by hand, from evaluate and generate."""
    folder, words = of_tasks
    run = folder / "run"
    model = lb.load_model(run / "model" if (run / "model").exists() else home / "model")
    if (run / "adapter").exists():
        load_adapter(model, run / "adapter")
    if (run / "adapters").exists():
        load_adapter(model, run / "adapters" / task)
    if (run / "heads").exists():
        load_heads(model, run / "heads")
        use_head(model, task)
    config = FineTuningConfig(batch_size=4, max_seq_length=16)
    wanted = Judge(model, Loader(model, config)).evaluate(load_dataset(folder / f"{task}.txt", config))
    settings = ["--batch-size", "4", "--max-seq-length", "16", "--json"]

    def judged(data: str, task: str) -> dict:
        capfd.readouterr()
        assert main(["evaluate", *words, "--dataset", f"{folder}/{data}", *settings, "--task", task]) == 0
        return json.loads(capfd.readouterr().out)

    assert judged(f"{task}.txt", task) == judged("tasks.yaml", task)
    assert judged("tasks.yaml", task)["loss"] == wanted.loss
    other = {"cats": "dogs", "dogs": "cats"}[task]
    assert judged(f"{task}.txt", other)["loss"] != wanted.loss
    (tokens,) = generate(model, [model.tokenizer("The c")["input_ids"]], 6, stop_ids=end_ids(model))
    assert main(["generate", *words, "--prompt", "The c", "--max-new-tokens", "6", "--task", task]) == 0
    assert capfd.readouterr().out == f"{model.tokenizer.decode(tokens, skip_special_tokens=True)}\n"


def test_a_run_of_tasks_says_how_to_chat_for_one(of_tasks, home, capfd, monkeypatch):
    folder, words = of_tasks
    words_of_run = ["finetune", "model", "--model", f"{home}/model", "--dataset", f"{folder}/tasks.yaml", "--resume"]
    assert main([*words_of_run, "--config", f"{folder}/run/config.yaml"]) == 0
    chat = shlex.split(capfd.readouterr().out.splitlines()[-1])
    assert chat == ["llmbuilder", "chat", *words, "--task", "cats"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    assert main([*chat[1:], "--max-new-tokens", "2"]) == 0


def test_an_unknown_task_is_told_with_those_there_are(of_tasks, home, run, capfd):
    _, words = of_tasks
    for command in (["generate", "--prompt", "a"], ["chat"]):
        told = refused(capfd, [*command, *words, "--task", "cat"], 1)
        assert "no task is called 'cat'; did you mean 'cats'?" in told and "['cats', 'dogs']" in told
    plain = ["--model", f"{home}/model", "--adapter", f"{run}/adapter"]
    for model in (plain, plain[:2]):
        assert "nothing of a task 'cats'" in refused(capfd, ["chat", *model, "--task", "cats"], 1)
    if words[-1].endswith("adapters"):
        told = refused(capfd, ["chat", *words], 1)
        assert "--task" in told and "['cats', 'dogs']" in told


@pytest.mark.parametrize("of_tasks", ["heads, one adapter", "heads, all weights"], indirect=True)
def test_heads_that_lie_unused_are_told(of_tasks, home, tmp_path, capfd, monkeypatch):
    """They are part of what the run learned; chat, generate and evaluate may use them, a merged model can't."""
    folder, words = of_tasks
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
    commands = {
        "chat": [*words, "--max-new-tokens", "2"],
        "generate": [*words, "--prompt", "a", "--max-new-tokens", "2"],
        "evaluate": [*words, "--dataset", f"{folder}/cats.txt", "--max-seq-length", "16"],
        "merge": [*words, "--output", f"{tmp_path}/merged"],
    }
    if words[-1].endswith("model"):
        del commands["merge"]
    for command, rest in commands.items():
        capfd.readouterr()
        assert main([command, *rest]) == 0
        told = capfd.readouterr().err
        assert f"warning: {folder}/run/heads has an output head for each of ['cats', 'dogs']" in told
        assert ("without --task the model's own answers" in told) == (command != "merge")
    assert main(["generate", *commands["generate"], "--task", "cats"]) == 0
    assert "heads" not in capfd.readouterr().err


@pytest.mark.parametrize("of_tasks", ["an adapter each"], indirect=True)
def test_the_adapter_of_one_task_serves_and_merges_by_its_folder(of_tasks, home, tmp_path, capfd):
    _, words = of_tasks

    def said(*words: str) -> str:
        capfd.readouterr()
        assert main(["generate", *words, "--prompt", "The ", "--max-new-tokens", "12"]) == 0
        return capfd.readouterr().out

    one = [*words[:-1], f"{words[-1]}/cats"]
    assert said(*one) == said(*one, "--task", "cats") == said(*words, "--task", "cats") != said(*words[:2])
    told = refused(capfd, ["generate", *one, "--prompt", "a", "--task", "dogs"], 1)
    assert "is the adapter of the task 'cats': give --task cats" in told
    merge = ["merge", "--output", f"{tmp_path}/merged"]
    told = refused(capfd, [*merge, *words], 1)
    assert f"name the one to merge, {words[-1]}/TASK, of ['cats', 'dogs']" in told and "--task" not in told
    assert main([*merge, *one]) == 0
    assert said("--model", f"{tmp_path}/merged") == said(*one)


def test_a_task_that_the_data_lack_is_refused(of_tasks, capfd):
    folder, words = of_tasks
    (folder / "others.yaml").write_text("- {name: dogs, data: dogs.txt, share: 1}\n")
    command = ["evaluate", *words, "--dataset", f"{folder}/others.yaml", "--max-seq-length", "16", "--task", "cats"]
    assert "the data: no task is called 'cats'" in refused(capfd, command, 1)


def test_evaluate_says_what_the_api_says(home, run, capfd):
    words = ["evaluate", "--model", f"{home}/model", "--adapter", f"{run}/adapter", "--dataset", f"{home}/short.txt"]
    capfd.readouterr()
    assert main([*words, "--max-seq-length", "32", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    config = FineTuningConfig(max_seq_length=32)
    model, dataset = lb.load_model(home / "model"), load_dataset(home / "short.txt", config)
    load_adapter(model, run / "adapter")
    wanted = FineTuner(model, dataset, dataset, config).evaluate(dataset)
    assert told["loss"] == pytest.approx(wanted.loss, rel=1e-6)
    assert told["perplexity"] == pytest.approx(math.exp(told["loss"]))
    assert told["bleu_score"] == pytest.approx(wanted.bleu_score)
    assert told["task_accuracy"] == pytest.approx(wanted.task_accuracy)
    assert main([*words, "--max-seq-length", "32"]) == 0
    out = capfd.readouterr().out
    assert f"loss           {told['loss']:.6g}" in out and "1 row read" in out


def test_chat_remembers_what_was_said_and_leaves_at_exit(home, monkeypatch, capfd):
    asked = []

    def answer(model, prompts, max_new_tokens, *_, **__):
        asked.append(model.tokenizer.decode(prompts[0]))
        return [model.tokenizer(f"answer {len(asked)}")["input_ids"]]

    monkeypatch.setattr("llmbuilder.models.generate", answer)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\n two \n/exit\nthree\n"))
    capfd.readouterr()
    assert main(["chat", "--model", f"{home}/model", "--system", "Be kind", "--max-new-tokens", "8"]) == 0
    assert capfd.readouterr().out == "answer 1\nanswer 2\n"
    assert len(asked) == 2
    assert "Be kind" in asked[0] and "one" in asked[0]
    assert [part in asked[1] for part in ("Be kind", "one", "answer 1", "two")] == [True] * 4


def test_chat_forgets_what_no_longer_fits_and_says_so(home, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Tell me a tale\nAnd then\nAnd so\n"))
    capfd.readouterr()
    assert main(["chat", "--model", f"{home}/model", "--max-new-tokens", "30"]) == 0
    assert "forgot the oldest 1" in capfd.readouterr().err


# As a program


def program(*words: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-P", "-m", "llmbuilder", *words], capture_output=True, text=True, timeout=300, **options
    )


def test_help_lists_the_commands_and_version_is_the_packages():
    done = program("--help")
    assert done.returncode == 0 and all(f"  {name}" in done.stdout for name in COMMANDS)
    assert program("--version").stdout == f"llmbuilder {lb.__version__}\n"
    assert program().returncode == 2


def test_help_of_finetune_lists_every_setting(capfd):
    assert main(["finetune", "model", "--help"]) == 0
    out = capfd.readouterr().out
    assert all(flag in out for row in rows().values() for flag in row.flags)


def test_the_program_chats_from_a_pipe(home, run):
    words = ["chat", "--model", f"{home}/model", "--adapter", f"{run}/adapter", "--max-new-tokens", "4"]
    done = program(*words, input="Hello\n")
    assert done.returncode == 0 and done.stdout.count("\n") >= 1


def test_a_line_to_chat_that_is_not_utf8_is_refused(home):
    words = [sys.executable, "-P", "-m", "llmbuilder", "chat", "--model", f"{home}/model"]
    for locale in ("C.UTF-8", "C"):  # strict, and with surrogates
        done = subprocess.run(
            words, input=b"a\xff\n", capture_output=True, timeout=300, env={**os.environ, "LC_ALL": locale}
        )
        told = done.stderr.decode()
        assert done.returncode == 1 and told.startswith("llmbuilder: what you said is not") and "unexpected" not in told


def test_the_program_exits_with_the_status(home):
    done = program("generate", "--model", f"{home}/nothing", "--prompt", "a")
    assert done.returncode == 1 and "Traceback" not in done.stderr


def test_control_c_ends_the_program_with_130_and_the_run_goes_on(home, run, tmp_path):
    output = tmp_path / "run"
    settings = flags(RUN_SETTINGS | {"num_epochs": 500, "save_every": 1})
    words = ["finetune", "model", "--model", f"{home}/model", "--dataset", f"{home}/text.txt"]
    command = [sys.executable, "-P", "-m", "llmbuilder", *words, "--output", str(output), *settings]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 120
    while not list(output.glob("checkpoints/step-*")) and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "Traceback" not in err
    assert err.splitlines()[-1].endswith("--resume")
    assert list(output.glob("checkpoints/step-*"))
