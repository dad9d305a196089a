"""FineTuningConfig: what it accepts, what it refuses and how it says so."""

from pathlib import Path

import pytest
import yaml

from llmbuilder.errors import ConfigError, UnknownNameError
from llmbuilder.finetune.config import LORA_SETTINGS, NOT_YET, FineTuningConfig
from llmbuilder.finetune.settings import rows, settings_page
from llmbuilder.nn import LoRAConfig

TESTS = Path(__file__).parents[1]
DOCS = TESTS.parent / "docs"


def refusal(**settings) -> str:
    with pytest.raises(ConfigError) as caught:
        FineTuningConfig(**settings)
    return str(caught.value)


def test_an_unknown_setting_is_refused_with_the_nearest_name():
    with pytest.raises(UnknownNameError, match="unknown setting 'lora_rnk'; did you mean 'lora_rank'"):
        FineTuningConfig(lora_rnk=8)


@pytest.mark.parametrize("name", NOT_YET)
def test_what_a_later_version_will_have_is_refused_by_name(name):
    with pytest.raises(UnknownNameError, match=f"^{name} is not yet available in this version"):
        FineTuningConfig(**{name: False})


def test_what_is_not_yet_available_is_no_setting():
    assert not set(NOT_YET) & set(rows())


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("num_epochs", 0),
        ("num_epochs", 1.5),
        ("num_epochs", True),
        ("max_steps", 0),
        ("learning_rate", 0),
        ("learning_rate", -1e-5),
        ("learning_rate", float("nan")),
        ("learning_rate", float("inf")),
        ("learning_rate", "fast"),
        ("batch_size", 0),
        ("gradient_accumulation_steps", 0),
        ("seed", -1),
        ("use_lora", "perhaps"),
        ("freeze_layers", -1),
        ("lora_rank", 0),
        ("lora_alpha", 0),
        ("lora_dropout", 1),
        ("lora_dropout", -0.1),
        ("lora_target_modules", []),
        ("lora_target_modules", 3),
        ("lora_config", "rank 8"),
        ("weight_decay", -1),
        ("dropout_rate", 1),
        ("optimizer", "adam"),
        ("scheduler", "cos"),
        ("warmup_steps", -1),
        ("warmup_ratio", 1.1),
        ("min_lr_ratio", -0.1),
        ("max_grad_norm", 0),
        ("eval_every", 0),
        ("save_every", 0),
        ("early_stopping_patience", 0),
        ("validation_split", 1),
        ("task_type", "translation"),
        ("max_seq_length", 1),
        ("data_collator", "pack"),
        ("turn_separator", ""),
        ("max_turns", 0),
        ("dtype", "fp64"),
        ("device", ""),
        ("dataloader_num_workers", -1),
    ],
)
def test_a_bad_value_is_refused_with_its_name_and_what_was_given(name, bad):
    text = refusal(**{name: bad})
    assert name in text and repr(bad) in text and "should" in text and "\n" not in text


def test_empty_targets_are_refused_where_others_would_be_implied_too():
    assert "lora_target_modules=[] should name" in refusal(style_adaptation=True, lora_target_modules=[])


def test_an_empty_output_dir_is_not_the_folder_one_stands_in():
    with pytest.raises(ConfigError, match="output_dir='' should name a folder"):
        FineTuningConfig(output_dir="")


def test_every_bad_value_is_named_at_once():
    text = refusal(num_epochs=0, batch_size="many")
    assert "num_epochs=0" in text and "batch_size='many'" in text


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"use_lora": False, "lora_rank": 8}, "use_lora=False contradicts lora_rank"),
        ({"use_lora": False, "target_modules": "all"}, "use_lora=False contradicts lora_target_modules"),
        ({"use_lora": False, "lora_config": {}}, "use_lora=False contradicts lora_config"),
        ({"early_stopping_patience": 2, "eval_every": None}, "eval_every=None has none before the end: set eval_every"),
        ({"warmup_steps": 0, "warmup_ratio": 0.0}, "warmup_steps and warmup_ratio"),
        ({"scheduler": "constant", "min_lr_ratio": 0.1}, "min_lr_ratio has no effect"),
        ({"dialogue_format": True, "task_type": "code"}, "dialogue_format=True contradicts task_type='code'"),
        ({"turn_separator": "<turn>"}, "need dialogue_format=True"),
        ({"max_turns": 3, "task_type": "instruction"}, "need dialogue_format=True"),
        ({"target_modules": ["mlp"], "lora_target_modules": "all"}, "contradicts target_modules=['mlp']"),
        ({"lora_rank": 8, "lora_config": LoRAConfig(rank=4)}, "lora_rank=8 contradicts lora_config.rank=4"),
        ({"lora_rank": 8, "lora_config": {"rank": 4}}, "lora_rank=8 contradicts lora_config.rank=4"),
        ({"target_modules": "mlp", "lora_config": LoRAConfig(target_modules="all")}, "contradicts"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(settings, told):
    assert told in refusal(**settings)


def test_an_unknown_field_of_lora_config_is_refused_when_it_is_given():
    with pytest.raises(UnknownNameError, match="did you mean 'rank'"):
        FineTuningConfig(lora_config={"rnak": 8})


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_config": LoRAConfig()},
        {"lora_config": {"rank": 4}},
        {"lora_rank": 4},
        {"lora_alpha": 1.0},
        {"lora_dropout": 0.0},
        {"lora_target_modules": ["mlp"]},
        {"target_modules": "all"},
        {"use_lora": True},
    ],
)
def test_any_lora_setting_turns_lora_on(settings):
    config = FineTuningConfig(**settings)
    assert config.use_lora is True
    assert isinstance(config.lora(), LoRAConfig)


def test_without_a_lora_setting_all_weights_train():
    assert set(LORA_SETTINGS) <= set(rows())
    assert FineTuningConfig().use_lora is False
    assert FineTuningConfig(use_lora=None, lora_rank=None, dropout_rate=0.1).use_lora is False
    assert FineTuningConfig(use_lora=False).lora() is None


def test_every_spelling_of_the_lora_settings_means_the_same():
    wanted = LoRAConfig(rank=4, alpha=12, dropout=0.1, target_modules=["attention", "mlp"])
    flat = {"lora_rank": 4, "lora_alpha": 12, "lora_dropout": 0.1}
    for settings in (
        {"lora_config": wanted},
        {"lora_config": wanted, **flat},
        {"lora_config": {"rank": 4, "alpha": 12}, "lora_dropout": 0.1, "target_modules": ["attention", "mlp"]},
        {**flat, "target_modules": ["attention", "mlp"]},
        {**flat, "lora_target_modules": ["attention", "mlp"]},
    ):
        config = FineTuningConfig(**settings)
        assert config.lora() == wanted, settings
        assert (config.lora_rank, config.lora_alpha, config.lora_dropout) == (4, 12, 0.1)
        assert config.lora_target_modules == ["attention", "mlp"]


def test_a_default_of_lora_config_contradicts_nothing():
    config = FineTuningConfig(lora_config=LoRAConfig(bias="all"), lora_rank=3, lora_dropout=0.2)
    assert config.lora() == LoRAConfig(rank=3, dropout=0.2, bias="all")


def test_lora_defaults():
    lora = FineTuningConfig(use_lora=True).lora()
    assert (lora.rank, lora.alpha, lora.dropout) == (16, 32, 0)
    assert FineTuningConfig(lora_rank=5).lora().alpha == 10
    assert FineTuningConfig(target_modules="all-linear").lora().target_modules == "all"
    assert FineTuningConfig(target_modules=["all"]).lora().target_modules == "all"


def test_dropout_rate_is_the_adapters_unless_they_have_their_own():
    assert FineTuningConfig(use_lora=True, dropout_rate=0.3).lora().dropout == 0.3
    assert FineTuningConfig(dropout_rate=0.3, lora_dropout=0.0).lora().dropout == 0.0
    assert FineTuningConfig(dropout_rate=0.3, lora_config=LoRAConfig(dropout=0.1)).lora().dropout == 0.1


def test_a_validated_config_cannot_be_changed():
    config = FineTuningConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.num_epochs = -1


FULL = {
    "num_epochs": 2,
    "learning_rate": 1e-4,
    "lora_config": LoRAConfig(rank=4, bias="lora_only", modules_to_save=["norm"], use_rslora=True),
    "target_modules": ["attention.query", "mlp"],
    "warmup_ratio": 0.1,
    "dialogue_format": True,
    "turn_separator": "<Wendung>",
    "max_grad_norm": None,
    "output_dir": "runs/a",
}


@pytest.mark.parametrize("settings", [{}, {"use_lora": True}, FULL])
def test_yaml_holds_every_setting_and_gives_an_equal_config_back(settings, tmp_path):
    config = FineTuningConfig(**settings)
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert set(yaml.safe_load(path.read_text())) == set(rows()) - {"target_modules"}
    again = FineTuningConfig.from_yaml(path)
    assert again == config
    assert again.lora() == config.lora()
    assert again.to_yaml() == config.to_yaml()


def test_yaml_numbers_without_a_point_are_numbers(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("learning_rate: 5e-5\n")  # text by YAML 1.1
    assert FineTuningConfig.from_yaml(path).learning_rate == 5e-5


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("num_epochs: 0", "num_epochs=0 should be"),
        ("num_epoch: 1", "did you mean 'num_epochs'"),
        ("- num_epochs", "lines of the form"),
        ("a: [1", "not YAML"),
        (b"\xff\xfe\x00", "not YAML"),
        ("fsdp: 2", "not yet available"),
    ],
)
def test_a_bad_file_is_named(content, told, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError) as caught:
        FineTuningConfig.from_yaml(path)
    assert str(caught.value).startswith(f"{path}: ") and told in str(caught.value)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"nothing.yaml: cannot be read \(No such file"):
        FineTuningConfig.from_yaml(tmp_path / "nothing.yaml")


def test_an_empty_file_means_the_defaults(tmp_path):
    path = tmp_path / "empty.yaml"
    path.write_text("# nothing set\n")
    assert FineTuningConfig.from_yaml(path) == FineTuningConfig()


def test_changes_name_what_a_resumed_run_may_not_change():
    one = FineTuningConfig(lora_rank=4, dataloader_num_workers=2, output_dir="a", save_every=5)
    two = FineTuningConfig(lora_config=LoRAConfig(rank=8), seed=1, output_dir="b", save_every=9)
    assert one.changes(one) == []
    changes = one.changes(two)
    assert "seed: 0 -> 1" in changes and "lora_rank: 4 -> 8" in changes
    assert not any(name in change for change in changes for name in ("output_dir", "workers", "save_every"))


def test_each_setting_has_a_row_that_says_what_it_does():
    for name, row in rows().items():
        assert row.effect and row.observable, name
        assert name in (TESTS / row.test).read_text(encoding="utf-8"), f"tests/{row.test} does not test {name}"
        assert row.flags[-1] == "--" + name.replace("_", "-")
    flags = [flag for row in rows().values() for flag in row.flags]
    assert len(flags) == len(set(flags))


def test_the_page_of_settings_is_up_to_date():
    assert (DOCS / "settings.md").read_text(encoding="utf-8") == settings_page(), (
        "run: python -m llmbuilder.finetune.settings > docs/settings.md"
    )
