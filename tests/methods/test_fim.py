"""Fill-in-the-middle: half of the examples, cut at nodes, each piece behind its sentinel."""

import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from llmbuilder.data import TaskDataset, TextDataset
from llmbuilder.data.code import Pieces, split_at_nodes
from llmbuilder.errors import ConfigError, LLMBuilderError
from llmbuilder.finetune import FineTuningConfig
from llmbuilder.methods import FillInTheMiddle, Run
from llmbuilder.methods.fim import SENTINELS, fill_in, known_sentinels
from llmbuilder.models import byte_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:no validation data")
FUNCTION = "def add_{n}(a, b):\n    c = a + {n} * b\n    return [c, 'ü']\n"


@pytest.fixture
def dataset() -> Any:
    rows = [{"text": FUNCTION.format(n=n)} for n in range(200)]
    return lambda count=200: TextDataset(rows[:count], block_size=96)


def turned(model: Any, data: Any, limit: int = 96, seed: int = 0) -> Any:
    method = FillInTheMiddle("python", limit, None)
    method.extend(model)
    data.bind(model.tokenizer, FineTuningConfig(max_seq_length=limit))
    run = Run(model, seed, {"train": data})
    method.prepare(run)
    return run.sources["train"]


def rejoined(tokenizer: Any, ids: list[int]) -> str:
    """The source that prefix, middle and suffix are pieces of."""
    before, between, behind = tokenizer.convert_tokens_to_ids(SENTINELS[0])
    assert ids[0] == before and ids[-1] == tokenizer.eos_token_id
    prefix, rest = ids[1 : ids.index(between)], ids[ids.index(between) + 1 : -1]
    suffix, middle = rest[: rest.index(behind)], rest[rest.index(behind) + 1 :]
    return str(tokenizer.decode([*prefix, *middle, *suffix]))


def test_syntax_aware_training_turns_half_of_the_examples_and_their_pieces_rejoin(make_gpt: Any, dataset: Any) -> None:
    model = make_gpt(text=True, block_size=128)
    data = turned(model, dataset())
    sources = {FUNCTION.format(n=n) for n in range(200)}
    first = model.tokenizer.convert_tokens_to_ids(SENTINELS[0][0])
    middle = [index for index in range(200) if data[index]["input_ids"][0] == first]
    assert len(middle) == 100
    for index in range(200):
        row = data[index]
        assert row["labels"] == row["input_ids"]
        if index in data.turned:
            assert rejoined(model.tokenizer, row["input_ids"]) == FUNCTION.format(n=index)
        else:
            assert model.tokenizer.decode(row["input_ids"]) in sources
    again = turned(make_gpt(text=True, block_size=128), dataset())
    assert [again[n] for n in range(200)] == [data[n] for n in range(200)]
    other = turned(make_gpt(text=True, block_size=128), dataset(), seed=1)
    assert [other[n] for n in range(200)] != [data[n] for n in range(200)]


def test_the_middle_is_what_split_at_nodes_cuts_out() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(list(SENTINELS[0]), special_tokens=True)
    source = FUNCTION.format(n=1)
    pieces = split_at_nodes(source, "python", random.Random(1))
    assert pieces is not None
    text = tokenizer.decode(fill_in(tokenizer, pieces, SENTINELS[0], 200)["input_ids"])
    before, between, behind = SENTINELS[0]
    assert text == f"{before}{pieces.prefix}{between}{pieces.suffix}{behind}{pieces.middle}<|endoftext|>"


@pytest.mark.parametrize("limit", [12, 13, 20, 24, 100])
def test_what_is_too_long_loses_the_far_ends(limit: int) -> None:
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(list(SENTINELS[0]), special_tokens=True)
    example = fill_in(tokenizer, Pieces("abcdefgh", "12345", "uvwxyz"), SENTINELS[0], limit)
    text = tokenizer.decode(example["input_ids"])
    room = limit - 5 - 4
    assert len(example["input_ids"]) == min(limit, 8 + 5 + 6 + 4)
    prefix, suffix = text.split("<fim_suffix>")[0][12:], text.split("<fim_suffix>")[1].split("<fim_middle>")[0]
    assert "abcdefgh".endswith(prefix) and "uvwxyz".startswith(suffix) and "<fim_middle>12345" in text
    assert len(prefix) + len(suffix) == min(room, 14)
    assert fill_in(tokenizer, Pieces("a", "x" * limit, "b"), SENTINELS[0], limit) is None


def test_sentinels_that_the_model_knows_are_used(make_gpt: Any, dataset: Any) -> None:
    model = make_gpt(text=True, block_size=128)
    model.tokenizer.add_tokens(list(SENTINELS[1]), special_tokens=True)
    assert known_sentinels(model.tokenizer) == SENTINELS[1]
    size = len(model.tokenizer)
    data = turned(model, dataset(20))
    assert len(model.tokenizer) == size and model.embedding.num_embeddings == size
    first = model.tokenizer.convert_tokens_to_ids(SENTINELS[1][0])
    assert {data[index]["input_ids"][0] for index in data.turned} == {first}


def test_examples_with_a_prompt_stay_as_they_are_and_none_turned_is_an_error(make_gpt: Any) -> None:
    data = TaskDataset([{"prompt": "add", "completion": FUNCTION.format(n=n)} for n in range(4)], "code")
    with pytest.raises(LLMBuilderError, match="found no syntax to cut at in 4 examples: give plain code in python"):
        turned(make_gpt(text=True, block_size=128), data)


def test_a_run_trains_the_new_tokens_and_saves_them(make_gpt: Any, dataset: Any, tune: Any, tmp_path: Path) -> None:
    """Under LoRA; with special tokens and the code loss beside it; resumed bit for bit."""
    settings = {"syntax_aware_training": True, "code_specific_loss": True, "special_tokens": ["<code>"], "lora_rank": 2}
    settings |= {"output_dir": tmp_path / "run", "save_every": 1, "max_seq_length": 96, "max_steps": 3}
    whole = tune(make_gpt(text=True, block_size=128), dataset(20), **settings)
    rows = [weight for name, weight in whole.model.named_parameters() if name.endswith(".rows")]
    assert [tuple(weight.shape) for weight in rows] == [(4, 16)]
    assert whole.model.tokenizer.convert_tokens_to_ids(["<code>", *SENTINELS[0]]) == [258, 259, 260, 261]
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-3")
    (tmp_path / "run" / "results.json").unlink()
    again = tune(make_gpt(text=True, block_size=128), dataset(20), **settings, resume=True)
    for one, other in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)
    weighed = whole.run.sources["train"]
    index = next(n for n in range(20) if weighed[n]["input_ids"][0] == 259)
    assert len(weighed[index]["weights"]) == len(weighed[index]["input_ids"])
    assert weighed[index]["weights"][0] == max(weighed[index]["weights"])


def test_without_a_tokenizer_or_with_other_text_it_is_refused(make_gpt: Any, make_rows: Any, tune: Any) -> None:
    with pytest.raises(LLMBuilderError, match="the model has no tokenizer"):
        tune(make_gpt(), make_rows(2), syntax_aware_training=True)
    with pytest.raises(ConfigError, match="read code"):
        FineTuningConfig(syntax_aware_training=True, task_type="conversation")
    with pytest.raises(ConfigError, match="freeze_embeddings keeps them from learning"):
        FineTuningConfig(syntax_aware_training=True, freeze_embeddings=True)
