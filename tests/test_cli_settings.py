"""What a command line and the file of --config mean together: flag > file > default, and nothing ignored."""

from collections.abc import Callable
from pathlib import Path

import pytest

from llmbuilder.cli import main
from llmbuilder.finetune import FineTuningConfig
from llmbuilder.nn import LoRAConfig

Configured = Callable[..., FineTuningConfig]


def finetune(tmp_path: Path, text: str, words: list[str]) -> int:
    """The status of `finetune model` with a file of settings and flags."""
    file = tmp_path / "settings.yaml"
    file.write_text(text)
    command = ["finetune", "model", "--model", f"{tmp_path}/none", "--dataset", "d", "--output", f"{tmp_path}/run"]
    return main([*command, "--config", str(file), *words])


def refused(text: str, words: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str], status: int = 1) -> str:
    """The one line that a refusal prints."""
    capfd.readouterr()
    assert finetune(tmp_path, text, words) == status
    out, err = capfd.readouterr()
    assert out == "" and err.count("\n") == 1 and err.startswith("llmbuilder: ")
    return err


@pytest.fixture
def configured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Configured:
    """The configuration that `finetune model` makes of the text of a file and of flags."""
    seen: list[FineTuningConfig] = []
    monkeypatch.setattr("llmbuilder.data.load_dataset", lambda path, config: seen.append(config) or [])

    def configure(text: str, *words: str) -> FineTuningConfig:
        seen.clear()
        assert finetune(tmp_path, text, list(words)) == 1  # there is no model
        return seen[0]

    return configure


# A file, what it makes of the adapters, a flag that beats it, and what they are then.
LORA = [
    ("lora_rank: 4", {"rank": 4}, ["--lora-rank", "5"], {"rank": 5}),
    ("lora_alpha: 3", {"alpha": 3}, ["--lora-alpha", "5"], {"alpha": 5}),
    ("lora_dropout: 0.3", {"dropout": 0.3}, ["--lora-dropout", "0.0"], {"dropout": 0.0}),
    *(
        (f"{name}: [mlp]", {"target_modules": ["mlp"]}, [flag, "all"], {"target_modules": "all"})
        for name in ("lora_target_modules", "target_modules")
        for flag in ("--lora-target-modules", "--target-modules")
    ),
    *(
        (f"lora_config: {{{field}: {old}}}", {field: old}, flag, {field: new})
        for field, old, new in (
            ("rank", 4, 5),
            ("alpha", 3, 5),
            ("dropout", 0.3, 0.1),
            ("target_modules", "mlp", "all"),
        )
        for flag in ([f"--lora-{field.replace('_', '-')}", f"{new}"], ["--lora-config", f"{{{field}: {new}}}"])
    ),
    ("lora_config: {bias: all}", {"bias": "all"}, ["--lora-config", "{bias: lora_only}"], {"bias": "lora_only"}),
    ("lora_config: {bias: all}", {"bias": "all"}, ["--lora-config", "none", "--use-lora"], {}),
    ("lora_config: {rank: 4}", {"rank": 4}, ["--lora-config", "none", "--use-lora"], {}),
]


@pytest.mark.parametrize(("text", "meant", "flag", "flagged"), LORA)
def test_a_lora_setting_of_the_file_holds_until_its_flag_beats_it(text, meant, flag, flagged, configured):
    assert configured(text).lora() == LoRAConfig(**meant)
    assert configured(text, "--lora-config", "{use_rslora: true}").lora() == LoRAConfig(**meant, use_rslora=True)
    assert configured(text, *flag).lora() == LoRAConfig(**flagged)


@pytest.mark.parametrize("bad", ["lora_target_modules: 5", "lora_target_modules: []", "target_modules: {a: b}"])
def test_bad_targets_of_the_file_are_refused(bad, tmp_path, capfd):
    assert f"{tmp_path}/settings.yaml: lora_target_modules=" in refused(bad, [], tmp_path, capfd)


COMMANDS = {
    "finetune model --model m --dataset d": (
        *("--model", "--dataset", "--output", "--output-dir", "--val-dataset", "--general-dataset"),
        *("--base-val-dataset", "--continue-from", "--config"),
    ),
    "chat --model m": ("--model", "--adapter", "--task"),
    "generate --model m --prompt a": ("--model", "--adapter", "--task"),
    "evaluate --model m --dataset d": ("--model", "--dataset", "--adapter", "--task", "--config"),
    "merge --model m --adapter a --output o": ("--model", "--adapter", "--output"),
}


@pytest.mark.parametrize(("command", "flag"), [(words, flag) for words, flags in COMMANDS.items() for flag in flags])
def test_an_empty_path_or_name_is_refused_with_its_flag(command, flag, capfd):
    """As an unset variable of a shell leaves it; `--val-dataset ""` would else train without validation data."""
    assert main([*command.split(), flag, ""]) == 2
    assert capfd.readouterr().err.startswith(f"llmbuilder: {flag.removesuffix('-dir')} is empty: give a ")


# One thing said twice


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ("--epochs 3 --num-epochs 5", "--epochs and --num-epochs say two things of one setting"),
        ("--num-epochs=5 --epochs=5", "--num-epochs and --epochs say two things of one setting"),
        ("--use-lora --no-use-lora", "--use-lora and --no-use-lora say two things of one setting"),
        ("--special-tokens a --special-tokens b", "--special-tokens is given twice: give all in one"),
    ],
)
def test_two_flags_of_one_setting_are_refused(words, told, tmp_path, capfd):
    assert told in refused("", words.split(), tmp_path, capfd, status=2)


def test_a_flag_that_is_repeated_overrules_itself(configured):
    assert configured("", "--epochs", "3", "--epochs", "5", "--use-lora", "--use-lora").num_epochs == 5


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("lora_rank: 8\nseed: 1\nlora_rank: 4", "'lora_rank' is given twice, the second time in line 3"),
        ("lora_config:\n  bias: all\n  bias: none", "'bias' is given twice, the second time in line 3"),
        ("lora_config: {1: 2}", "lora_config={1: 2} should be a LoRAConfig or a mapping of its fields"),
        ("lora_config: 7", "lora_config=7 should be a LoRAConfig or a mapping of its fields"),
        ("lora_config: {bias: some}", "lora_config: bias='some' should be"),
        ("lora_config: {rank: 4}\nlora_rank: 8", "lora_rank=8 contradicts lora_config.rank=4"),
        ("seed: !!map 5", "not YAML"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(text, told, tmp_path, capfd):
    assert f"llmbuilder: {tmp_path}/settings.yaml: {told}" in refused(text, [], tmp_path, capfd)


def test_an_unknown_field_of_the_file_s_lora_config_is_named_with_the_file(tmp_path, capfd):
    told = refused("lora_config: {rnak: 8}", [], tmp_path, capfd, status=2)
    assert f"{tmp_path}/settings.yaml: lora_config: unknown key 'rnak'; did you mean 'rank'?" in told


def test_a_key_that_a_flag_gives_twice_is_refused_with_the_flag(tmp_path, capfd):
    told = refused("", ["--lora-config", "{rank: 8, rank: 4}"], tmp_path, capfd)
    assert "--lora-config '{rank: 8, rank: 4}': 'rank' is given twice" in told


def test_a_mapping_that_another_is_merged_into_may_overrule_it(configured):
    assert configured("lora_config: {<<: {rank: 8, bias: all}, rank: 4}").lora() == LoRAConfig(rank=4, bias="all")
