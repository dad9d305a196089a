"""General data: given, or made once by the base model."""

import itertools
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from llmbuilder.errors import ConfigError, LLMBuilderError
from llmbuilder.methods import General, Run
from llmbuilder.models import GPT, GPTConfig, byte_tokenizer
from llmbuilder.models.vocabulary import add_tokens

VOCABULARY = 31


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMBUILDER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def make_model(seed: int = 0, vocabulary: int = VOCABULARY) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return GPT(GPTConfig(vocab_size=vocabulary, n_layer=1, n_head=2, n_embd=16, block_size=24))


def prepared(model: nn.Module, tokens: int = 500, seed: int = 0, **settings: Any) -> tuple[General, Run]:
    method, run = General(tokens, **settings), Run(model, seed)
    method.extend(model)
    method.prepare(run)
    return method, run


def rows(run: Run) -> list[list[int]]:
    assert run.general is not None
    return [list(run.general[i]["input_ids"]) for i in range(len(run.general))]


def test_text_is_the_models_own_and_its_cost_is_announced() -> None:
    """A model that says after each token the next one: what it makes must be stretches of that circle."""
    model = make_model()
    with torch.no_grad():
        for block in model.blocks:
            block.attention.output.weight.zero_()
            block.mlp.down.weight.zero_()
        model.config.tie_word_embeddings = False
        model.embedding.weight = nn.Parameter(torch.eye(VOCABULARY, 16).repeat(1, 1)[torch.arange(VOCABULARY) % 16])
        model.head.weight = nn.Parameter(100 * torch.eye(16)[(torch.arange(VOCABULARY) - 1) % 16])
        model.head.weight[16:] = -100
    with pytest.warns(UserWarning, match=r"500 tokens of text are sampled from the base model itself.*about \d+ s"):
        _, run = prepared(model)
    texts = rows(run)
    assert sum(map(len, texts)) <= 500 and sum(map(len, texts)) > 450
    assert max(map(len, texts)) == 24
    for text in texts:
        assert all(after == (before + 1) % 16 for before, after in itertools.pairwise(text))
    assert run.sources["general"] is run.general
    assert run.general[0]["labels"] == run.general[0]["input_ids"]


def test_it_is_made_once_for_a_model_and_a_seed_and_draws_from_nobodys_generator(cache: Path) -> None:
    model, before = make_model(), torch.get_rng_state()
    with pytest.warns(UserWarning, match="sampled from the base model"):
        _, first = prepared(model, label="medical")
    assert [path.name.startswith("medical-") for path in cache.iterdir()] == [True]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, again = prepared(make_model(), label="medical")
    assert rows(again) == rows(first)
    assert torch.equal(torch.get_rng_state(), before)
    for other in ({"seed": 1}, {"tokens": 499}):
        with pytest.warns(UserWarning, match="sampled from the base model"):
            prepared(make_model(), label="medical", **other)
    with pytest.warns(UserWarning, match="sampled from the base model"):
        _, different = prepared(make_model(seed=1), label="medical")
    assert rows(different) != rows(first)


CHANGES: dict[str, Callable[[Any], object]] = {
    "a setting of the model": lambda model: setattr(model.config, "rms_norm_eps", 0.1),
    "where its texts end": lambda model: setattr(model.generation_config, "eos_token_id", 7),
    "where they begin": lambda model: setattr(model.tokenizer, "bos_token", "!"),
    "a special token": lambda model: setattr(model.tokenizer, "mask_token", "!"),
    "a token": lambda model: setattr(model, "tokenizer", tokenizer_with("bb")),
}


def tokenizer_with(token: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([token])
    return tokenizer


@pytest.mark.parametrize("change", CHANGES)
def test_text_is_made_anew_where_the_model_would_make_another(change: str) -> None:
    shape = {"vocab_size": 300, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}

    def load() -> Any:
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=2, max_position_embeddings=24))
        model.tokenizer = tokenizer_with("aa")
        return model

    with pytest.warns(UserWarning, match="sampled from the base model"):
        prepared(load())
    moved = load()
    moved.config._name_or_path, moved.config.transformers_version = "elsewhere", "0.1"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepared(moved)
    other = load()
    CHANGES[change](other)
    with pytest.warns(UserWarning, match="sampled from the base model"):
        prepared(other)


def test_no_text_is_longer_than_an_example_may_be() -> None:
    with pytest.warns(UserWarning, match="sampled"):
        _, run = prepared(make_model(), length=9)
    assert max(map(len, rows(run))) == 9 and sum(map(len, rows(run))) > 480


@pytest.mark.parametrize("damage", ["rubbish", "no texts", "a bound beyond the end", "nothing to learn", "starts lost"])
def test_a_damaged_file_is_made_again(cache: Path, damage: str) -> None:
    with pytest.warns(UserWarning, match="sampled"):
        _, first = prepared(make_model())
    (file,) = cache.iterdir()
    parts = {name: tensor.clone() for name, tensor in load_file(file).items()}
    if damage == "no texts":
        parts |= {"bounds": torch.zeros(1, dtype=torch.int64), "starts": torch.zeros(0, dtype=torch.int64)}
    elif damage == "a bound beyond the end":
        parts["bounds"][-1] += 90
    elif damage == "nothing to learn":
        parts["starts"][0] = 99
    else:
        parts["starts"] = parts["starts"][1:].clone()
    save_file(parts, file)
    if damage == "rubbish":
        file.write_bytes(b"rubbish")
    with pytest.warns(UserWarning, match="sampled"):
        _, again = prepared(make_model())
    assert rows(again) == rows(first)


@pytest.mark.filterwarnings("ignore:no general_dataset")
@pytest.mark.parametrize("what", ["a file in its place", "no folder there", "a full disk"])
def test_text_that_cannot_be_kept_is_used_all_the_same(cache: Path, monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    _, wanted = prepared(make_model())
    (file,) = cache.iterdir()
    if what == "no folder there":
        monkeypatch.setenv("LLMBUILDER_CACHE", "/proc/nope")
    elif what == "a file in its place":
        file.unlink()
        cache.rmdir()
        cache.write_text("mine")
    else:
        monkeypatch.setattr("llmbuilder.methods.general.save_file", refuse)
        file.unlink()
    with pytest.warns(UserWarning, match="not kept for later runs: .* can't be written .*set LLMBUILDER_CACHE"):
        _, run = prepared(make_model())
    assert rows(run) == rows(wanted)


def refuse(*_: Any) -> None:
    raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")


def test_given_data_are_used_and_others_refused_on_resume() -> None:
    given = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}]
    method, run = General(), Run(make_model(), general=given)
    method.prepare(run)
    assert run.sources["general"] is given and not list(method.past())
    other = General()
    other.prepare(Run(make_model(), general=[{"input_ids": [1, 2, 4], "labels": [1, 2, 4]}]))
    method.load_state(method.state())
    with pytest.raises(ConfigError, match="other general data"):
        other.load_state(method.state())


@pytest.mark.filterwarnings("ignore:no general_dataset")
def test_a_checkpoint_and_a_later_task_bring_the_first_base_models_text() -> None:
    first, run = prepared(make_model())
    resumed, later = prepared(make_model(seed=1))
    assert rows(later) != rows(run)
    resumed.load_state(first.state())
    assert rows(later) == rows(run)

    next_task, last = General(500), Run(make_model(seed=2))
    next_task.load_past(first.past())
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nothing is sampled
        next_task.prepare(last)
    assert rows(last) == rows(run)


@pytest.mark.filterwarnings("ignore:no general_dataset")
def test_an_earlier_tasks_text_is_no_longer_than_this_ones_settings_allow() -> None:
    """What a later task and a resumed run get is the text that was cut."""
    first, run = prepared(make_model())
    next_task, last = General(100, length=9), Run(make_model())
    next_task.load_past(first.past())
    next_task.prepare(last)
    assert rows(last) == [row[:9] for row in rows(run)][:11]
    assert next_task.past().keys() == first.past().keys()
    third, later = General(), Run(make_model())
    third.load_past(next_task.past())
    third.prepare(later)
    assert rows(later) == rows(last)
    third.load_state(next_task.state())
    assert rows(later) == rows(last)


def test_texts_of_which_nothing_is_left_to_learn_go() -> None:
    past = {"ids": torch.arange(20), "bounds": torch.tensor([0, 8, 12, 20]), "starts": torch.tensor([5, 1, 3])}
    method, run = General(7, length=4), Run(make_model())
    method.load_past(past)
    method.prepare(run)
    assert run.general is not None
    assert [run.general[i]["labels"] for i in range(len(run.general))] == [[-100, 9, 10, 11]]
    with pytest.raises(ConfigError, match=r"3 tokens a text and 1 in all leave nothing to learn: raise max_seq_length"):
        method = General(1, length=3)
        method.load_past(past)
        method.prepare(Run(make_model()))


@pytest.mark.filterwarnings("ignore:no general_dataset")
def test_texts_end_where_the_model_ends_them_and_start_at_no_special_token() -> None:
    model = make_model(vocabulary=300)
    model.tokenizer = byte_tokenizer()
    _, run = prepared(model, tokens=3000)
    starts = {text[0] for text in rows(run)}
    assert len(starts) > 20 and max(starts) < 256
    assert not any(256 in text for text in rows(run))
    with torch.no_grad():
        model.embedding.weight.zero_()
        model.norm.weight.zero_()
    model.tokenizer.eos_token = "!"
    model.head = nn.Linear(16, 300)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.fill_(-100)
        model.head.bias[ord("!")] = 100
    with pytest.raises(LLMBuilderError, match="ends its texts before they begin: give a general_dataset"):
        prepared(model, tokens=3000)


@pytest.mark.filterwarnings("ignore:no general_dataset")
def test_text_holds_no_token_that_the_run_has_just_added() -> None:
    """Nor one that no tokenizer has: rows of the embedding that pad it."""
    model = make_model(vocabulary=300)
    model.tokenizer = byte_tokenizer()
    known = len(model.tokenizer)
    method, run = General(2000), Run(model)
    method.extend(model)
    (new,) = add_tokens(model, ["<new>"])
    assert new == known < 300
    with torch.no_grad():  # the likeliest of all, where what they are multiplied by is not negative
        model.embedding.weight[known:] = 100.0
    method.prepare(run)
    assert max(max(text) for text in rows(run)) < known
