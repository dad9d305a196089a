"""Loss by hand, BLEU by sacrebleu on strings made here, exact match, and nothing disturbed."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import sacrebleu
import torch
import torch.nn.functional as F
from torch import nn

from llmbuilder.errors import LLMBuilderError
from llmbuilder.finetune import FineTuner
from llmbuilder.finetune.evaluate import bleu, exact_match
from llmbuilder.finetune.results import perplexity
from llmbuilder.models import byte_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore:no validation data")
WORDS = ["red green", "one two three", "a b c d", "left right", "up down up"]


class Pairs:
    """A data set of prompts and answers, as ``llmbuilder.data`` makes them."""

    def __init__(self, rows: list[tuple[str, str]], metric: str, tokenizer: Any) -> None:
        self.metric = metric
        self.limits: list[int] = []
        self.pairs = [(tokenizer(prompt)["input_ids"], answer) for prompt, answer in rows]
        ids = [(prompt, tokenizer(answer)["input_ids"] + [tokenizer.eos_token_id]) for prompt, answer in self.pairs]
        self.examples = [{"input_ids": p + a, "labels": [-100] * len(p) + a} for p, a in ids]

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self.examples[index]

    def generation_pairs(self, limit: int) -> list[tuple[list[int], str]]:
        self.limits.append(limit)
        return self.pairs[:limit]


class Drawing(Pairs):
    """Draws from torch's generator whenever it is read, as a data set that augments its examples would."""

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        torch.rand(3)
        return super().__getitem__(index)


@pytest.fixture
def model(make_gpt: Callable[..., nn.Module]) -> nn.Module:
    gpt = make_gpt(vocab_size=258, block_size=64, n_embd=64)
    gpt.tokenizer = byte_tokenizer()
    return gpt


def tuner_for(model: nn.Module, data: Any, make_config: Callable[..., Any], **settings: Any) -> FineTuner:
    return FineTuner(model, data, config=make_config(learning_rate=3e-3, **settings))


def greedy(model: nn.Module, prompt: list[int], most: int) -> list[int]:
    """One token after another, the whole sequence each time."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(most):
            token = int(model.eval()(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
            if token == model.tokenizer.eos_token_id:
                break
            ids.append(token)
    return ids[len(prompt) :]


def test_everything_equals_an_independent_computation(model: nn.Module, make_config: Callable[..., Any]) -> None:
    rows = [(f"Q{number}: ", words) for number, words in enumerate(WORDS)]
    data = Pairs(rows, "exact_match", model.tokenizer)
    tuner = tuner_for(model, data, make_config, num_epochs=60)
    tuner.train()
    found = tuner.evaluate(data)

    loss, count = 0.0, 0
    for example in data.examples:
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1].double()
        targets = torch.tensor(example["labels"])[1:]
        loss += float(F.cross_entropy(logits, targets, ignore_index=-100, reduction="sum"))
        count += int((targets != -100).sum())
    assert found.tokens == count
    assert found.loss == pytest.approx(loss / count, rel=1e-5)
    assert found.perplexity == pytest.approx(math.exp(loss / count), rel=1e-5)

    decode = model.tokenizer.decode
    said = [decode(greedy(model, prompt, len(answer) + 1)).strip() for prompt, answer in data.pairs]
    answers = [answer for _, answer in data.pairs]
    assert sorted(found.generations) == sorted(zip(said, answers, strict=True))
    assert found.bleu_score == sacrebleu.corpus_bleu(*zip_lists(found.generations)).score
    right = sum(one == other for one, other in zip(said, answers, strict=True))
    assert found.task_accuracy == right / 5
    assert right > 0  # it has learnt something, else this compares nothing
    assert data.limits[-1] == 64


def zip_lists(pairs: list[tuple[str, str]]) -> tuple[list[str], list[list[str]]]:
    return [said for said, _ in pairs], [[wanted for _, wanted in pairs]]


def test_an_answer_that_goes_on_is_not_an_exact_match(model: nn.Module, make_config: Callable[..., Any]) -> None:
    long = Pairs([("Q: ", "yes indeed")], "exact_match", model.tokenizer)
    tuner = tuner_for(model, long, make_config, num_epochs=60)
    tuner.train()
    assert tuner.evaluate(long).task_accuracy == 1.0
    cut = tuner.evaluate(Pairs([("Q: ", "yes")], "exact_match", model.tokenizer))
    assert cut.generations == [("yes", "yes")] or cut.task_accuracy == 0.0
    assert tuner.evaluate(Pairs([("Q: ", "yes inde")], "exact_match", model.tokenizer)).task_accuracy == 0.0


def test_accuracy_elsewhere_is_that_of_the_next_token(model: nn.Module, make_config: Callable[..., Any]) -> None:
    data = Pairs([(f"{words} ", words) for words in WORDS], "next_token", model.tokenizer)
    tuner = tuner_for(model, data, make_config, num_epochs=10)
    tuner.train()
    right = count = 0
    for example in data.examples:
        with torch.no_grad():
            best = model(input_ids=torch.tensor([example["input_ids"]])).logits[0, :-1].argmax(-1)
        targets = torch.tensor(example["labels"])[1:]
        right += int((best == targets).sum())
        count += int((targets != -100).sum())
    assert tuner.evaluate(data).task_accuracy == right / count > 0


def test_nothing_to_compare_is_nan(
    make_gpt: Callable[..., nn.Module], make_examples: Callable[..., Any], make_config: Callable[..., Any]
) -> None:
    found = FineTuner(make_gpt(), make_examples(4), config=make_config()).evaluate(make_examples(3, seed=5))
    assert math.isnan(found.bleu_score) and found.generations == []
    assert 0 <= found.task_accuracy <= 1 and math.isfinite(found.loss)
    assert math.isnan(bleu([])) and math.isnan(exact_match([]))


def test_pairs_that_do_not_fit_the_context_are_left_out(model: nn.Module, make_config: Callable[..., Any]) -> None:
    data = Pairs([("x" * 40, "y" * 20), ("x" * 4, "yy")], "exact_match", model.tokenizer)
    data.pairs[0] = (data.pairs[0][0], "y" * 30)
    found = tuner_for(model, data, make_config).evaluate(data)
    assert [wanted for _, wanted in found.generations] == ["yy"]


def test_evaluating_leaves_weights_modes_gradients_and_random_states_alone(
    model: nn.Module, make_config: Callable[..., Any]
) -> None:
    data = Drawing([("a ", "b")], "exact_match", model.tokenizer)
    tuner = tuner_for(model, data, make_config)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    state = torch.get_rng_state()
    first, second = tuner.evaluate(data), tuner.evaluate(data)
    assert first == second
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(weight, before[name]) and weight.grad is None for name, weight in model.named_parameters())


def test_data_without_a_target_are_refused(make_gpt: Any, make_examples: Any, make_config: Any) -> None:
    tuner = FineTuner(make_gpt(), make_examples(4), config=make_config())
    data = [{"input_ids": [1, 2], "labels": [1, -100]}]
    with pytest.raises(LLMBuilderError, match="the data set has no targets"):
        tuner.evaluate(data)
    with pytest.raises(LLMBuilderError, match="no token to predict"):  # as a part that was held out of others
        tuner.judge.score(data)


def test_exact_match_ignores_white_space_only() -> None:
    assert exact_match([("a  b\n", "a b"), ("A b", "a b"), ("a b.", "a b"), ("", "")]) == 0.5


def test_a_perplexity_beyond_a_float_is_infinite() -> None:
    assert perplexity(1.0) == math.e
    assert perplexity(1000.0) == math.inf
