"""Text in a model's own words: of chat models questions, and answers that are learnt."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tokenizers import AddedToken
from torch import nn
from transformers import AutoTokenizer

from llmbuilder.data.examples import IGNORED
from llmbuilder.errors import LLMBuilderError
from llmbuilder.methods.own_words import Texts, make_texts, template_of
from llmbuilder.models import GPT, GPTConfig, byte_tokenizer, generate

pytestmark = pytest.mark.filterwarnings("ignore:no general_dataset")

MARKED = (
    "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
PLAIN = (
    "{% for m in messages %}"
    "{% if m['role'] == 'user' %}Q>{{ m['content'] }}|A#{% else %}{{ m['content'] }}~{% endif %}"
    "{% endfor %}"
)
CIRCLE = {">": "w", "w": "|", "|": "A", "A": "#", "#": "y", "y": "~", "~": "Q", "Q": ">"}


def make_chatter(template: str, follows: dict[str, str], special: tuple[str, ...] = ()) -> Any:
    """A model that says after each token the one that follows, whatever stood before."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(special)})
    tokenizer.chat_template = template
    size = len(tokenizer)
    model: Any = GPT(GPTConfig(vocab_size=size, n_layer=1, n_head=1, n_embd=size + size % 2, block_size=256))
    model.tokenizer = tokenizer
    head = torch.zeros(size, model.config.n_embd)
    for before, after in follows.items():
        (column,), (row,) = (tokenizer(token, add_special_tokens=False)["input_ids"] for token in (before, after))
        head[row, column] = 100.0
    with torch.no_grad():
        for block in model.blocks:
            block.attention.output.weight.zero_()
            block.mlp.down.weight.zero_()
        model.embedding.weight = nn.Parameter(torch.eye(size, model.config.n_embd))
        model.head.weight = nn.Parameter(head)
    return model


def said(model: Any, texts: Texts) -> list[tuple[str, str]]:
    """What is not learnt of each text, and what is."""
    pairs = []
    for example in texts:
        ids, labels = example["input_ids"], example["labels"]
        start = next(i for i, label in enumerate(labels) if label != IGNORED)
        assert labels[start:] == ids[start:]
        pairs.append((model.tokenizer.decode(ids[:start]), model.tokenizer.decode(ids[start:])))
    return pairs


def test_a_chat_model_asks_and_its_answers_are_learnt() -> None:
    """Equal texts of ten tokens, but for the last, which the number of tokens cuts."""
    follows = {"<user>": "w", "w": "h", "h": "y", "y": "<end>", "<assistant>": "B", "B": "y"}
    model = make_chatter(MARKED, follows, ("<user>", "<assistant>", "<end>"))
    texts = make_texts(model, len(model.tokenizer), tokens=50, length=64, seed=0)
    whole = ("<user>why<end>\n<assistant>", "By<end>")
    assert len(model.tokenizer("".join(whole), add_special_tokens=False)["input_ids"]) == 10
    assert said(model, texts) == 5 * [whole]
    cut = said(model, make_texts(model, len(model.tokenizer), tokens=28, length=64, seed=0))
    assert cut == [whole, whole, (whole[0], "B")]


def test_turns_end_at_special_tokens_that_were_only_added(tmp_path: Path) -> None:
    """A model that says one turn after another, and whose marks of turns are none of all_special_ids."""
    turns = ("<user>", "<assistant>", "<end>")
    follows = {"<user>": "w", "w": "<end>", "<end>": "<user>", "<assistant>": "B", "B": "<end>"}
    model = make_chatter(MARKED, follows, turns)
    plain = byte_tokenizer()
    plain.add_tokens([AddedToken(turn, special=True) for turn in turns])
    plain.chat_template = MARKED
    plain.save_pretrained(tmp_path)
    model.tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert plain.get_vocab() == model.tokenizer.get_vocab() and "<end>" not in model.tokenizer.all_special_tokens
    texts = make_texts(model, len(model.tokenizer), tokens=40, length=64, seed=0)
    assert set(said(model, texts)) == {("<user>w<end>\n<assistant>", "B<end>")}
    model.tokenizer.chat_template = None
    starts = {text["input_ids"][0] for text in make_texts(model, len(model.tokenizer), 2000, length=2, seed=0)}
    assert not starts & set(model.tokenizer.convert_tokens_to_ids(turns))


def test_questions_and_answers_have_the_date_of_all_data() -> None:
    follows = {"<user>": "w", "w": "<end>", "<assistant>": "B", "B": "<end>"}
    model = make_chatter("{{ strftime_now('%Y') }}" + MARKED, follows, ("<user>", "<assistant>", "<end>"))
    texts = make_texts(model, len(model.tokenizer), tokens=40, length=64, seed=0)
    assert said(model, texts)[0] == ("2024<user>w<end>\n<assistant>", "B<end>")


def test_a_template_without_special_tokens_ends_the_question_and_an_answer_that_goes_on_has_no_end() -> None:
    """The model never stops of itself: its question is cut where the template goes on, its answer at the length."""
    model = make_chatter(PLAIN, CIRCLE)
    question, answer = said(model, make_texts(model, len(model.tokenizer), tokens=1000, length=40, seed=0))[0]
    assert question == "Q>w|A#"
    assert answer == ("y~Q>w|A#" * 5)[: 40 - len("Q>w|A#~")]


@pytest.mark.parametrize("template", [PLAIN, "{{ raise_exception('no') }}", "always the same"])
def test_without_room_or_a_template_that_fits_text_is_made(template: str) -> None:
    model = make_chatter(template, CIRCLE)
    length = 16 + len("Q>|A#~")
    assert (template_of(model, length) is not None) == (template == PLAIN)
    texts = make_texts(model, len(model.tokenizer), tokens=60, length=length - 1, seed=0)
    assert all(example["labels"] == example["input_ids"] for example in texts)
    assert all(len(example["input_ids"]) < length for example in texts)


def test_a_model_that_asks_nothing_is_an_error() -> None:
    model = make_chatter(MARKED, {"<user>": "<end>", "<assistant>": "B"}, ("<user>", "<assistant>", "<end>"))
    with pytest.raises(LLMBuilderError, match="asks nothing by its chat template: give a general_dataset"):
        make_texts(model, len(model.tokenizer), tokens=60, length=64, seed=0)


def often_silent() -> Any:
    """A model that says "a" at every second step or so, else the end of its text."""
    model: Any = GPT(GPTConfig(vocab_size=300, n_layer=1, n_head=1, n_embd=16, block_size=256))
    model.tokenizer = byte_tokenizer()
    model.head = nn.Linear(16, 300)
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.bias.fill_(-100)
        model.head.bias[[ord("a"), model.tokenizer.eos_token_id]] = 0.0
    return model


def test_a_model_that_says_something_now_and_then_makes_text() -> None:
    """A single text at a time is empty half of the time."""
    made = [make_texts(often_silent(), 258, tokens=6, length=256, seed=seed) for seed in range(10)]
    assert all(4 < len(texts.ids) <= 6 for texts in made)


def test_the_announced_time_is_that_of_the_tokens_that_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model whose texts end early: as many rounds as the text takes, by a clock that counts those of a second."""
    rounds = 0

    def count(*arguments: Any, **settings: Any) -> Any:
        nonlocal rounds
        rounds += 1
        return generate(*arguments, **settings)

    monkeypatch.setattr("llmbuilder.methods.own_words.generate", count)
    monkeypatch.setattr("llmbuilder.methods.own_words.time", SimpleNamespace(perf_counter=lambda: float(rounds)))
    with pytest.warns(UserWarning, match=r"which takes about \d+ s") as told:
        make_texts(often_silent(), 258, tokens=4000, length=256, seed=0)
    (seconds,) = re.findall(r"about (\d+) s", str(told[0].message))
    assert rounds / 3 < int(seconds) < rounds * 3 and rounds > 100
