"""Generation continues each prompt as transformers, and as a loop without cache or batch, would."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

from llmbuilder.errors import LLMBuilderError
from llmbuilder.models import GPT, GPTConfig, byte_tokenizer, end_ids, generate

PROMPTS = [[5, 70, 200, 7], [33], [104, 2, 90, 61, 18, 44, 250, 3, 9], [8, 8]]


def naive(model: nn.Module, prompt: list[int], new: int) -> list[int]:
    """The likeliest next token, one whole pass at a time."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(new):
            tokens.append(int(model(torch.tensor([tokens])).logits[0, -1].argmax()))
    return tokens[len(prompt) :]


def test_greedy_tokens_are_those_of_transformers(family: nn.Module) -> None:
    longest = max(map(len, PROMPTS))
    padded = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    theirs = family.generate(padded, attention_mask=mask, max_new_tokens=24, do_sample=False, pad_token_id=0)
    ours = generate(family, PROMPTS, 24)
    assert ours == theirs[:, longest:].tolist()
    assert len({token for tokens in ours for token in tokens}) > 4, (
        "the model says too little for this to show anything"
    )


def test_a_batch_is_each_prompt_alone_and_the_cache_changes_nothing(family: nn.Module) -> None:
    together = generate(family, PROMPTS, 12)
    assert together == [naive(family, prompt, 12) for prompt in PROMPTS]


def test_the_native_model_generates_alike(gpt: GPT) -> None:
    together = generate(gpt, PROMPTS, 40)
    assert together == [generate(gpt, [prompt], 40)[0] for prompt in PROMPTS]
    assert together == [naive(gpt, prompt, 40) for prompt in PROMPTS]
    assert len({token for tokens in together for token in tokens}) > 20


def test_a_model_without_a_cache_generates_alike(gpt: GPT) -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.config = gpt, gpt.config

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, position_ids: torch.Tensor) -> object:
            return self.inner(input_ids, attention_mask, position_ids)

    assert generate(Bare(), PROMPTS, 12) == generate(gpt, PROMPTS, 12)


def test_a_row_ends_before_its_stop_token_and_the_others_go_on(gpt: GPT) -> None:
    free = generate(gpt, PROMPTS, 20)
    stops = (free[0][7], free[2][3])
    expected = []
    for tokens in free:
        ends = [i for i, token in enumerate(tokens) if token in stops]
        expected.append(tokens[: ends[0]] if ends else tokens)
    assert generate(gpt, PROMPTS, 20, stop_ids=stops) == expected
    assert len({len(tokens) for tokens in expected}) > 1


def test_it_stops_working_when_every_row_has_ended(gpt: GPT) -> None:
    calls: list[int] = []
    gpt.register_forward_hook(lambda *_: calls.append(1))
    free = generate(gpt, PROMPTS[:1], 20)[0]
    calls.clear()
    generate(gpt, PROMPTS[:1], 20, stop_ids=[free[4]])
    assert len(calls) == free.index(free[4]) + 1


def test_sampled_tokens_follow_the_softmax(gpt: GPT) -> None:
    draws = 20_000
    with torch.no_grad():
        expected = (gpt(torch.tensor([[5, 70]])).logits[0, -1].double() / 1.5).softmax(-1) * draws
    generator = torch.Generator().manual_seed(6)
    tokens = [row[0] for row in generate(gpt, [[5, 70]] * draws, 1, temperature=1.5, generator=generator)]
    counts = torch.bincount(torch.tensor(tokens), minlength=264).double()
    often = expected >= 20
    assert often.sum() > 20
    chi2 = ((counts - expected)[often].square() / expected[often]).sum()
    freedom = float(often.sum())
    assert chi2 < freedom + 4 * (2 * freedom) ** 0.5, "four standard deviations of chi-squared"


def test_sampling_repeats_with_the_generator(gpt: GPT) -> None:
    def sample(seed: int) -> list[list[int]]:
        return generate(gpt, PROMPTS, 12, temperature=1.0, generator=torch.Generator().manual_seed(seed))

    assert sample(1) == sample(1) != sample(2)
    state = torch.get_rng_state()
    sample(3)
    assert torch.equal(torch.get_rng_state(), state), "a generator of one's own leaves torch's alone"


def test_every_module_gets_its_mode_back() -> None:
    model = GPT(GPTConfig(264, 2, 4, 32, 64, dropout=0.5)).train()
    model.blocks[0].eval()
    modes = [module.training for module in model.modules()]
    assert generate(model, PROMPTS, 4) == generate(model, PROMPTS, 4), "no dropout while it generates"
    assert [module.training for module in model.modules()] == modes


def test_no_prompts_and_no_new_tokens(gpt: GPT) -> None:
    assert generate(gpt, [], 5) == []
    assert generate(gpt, PROMPTS, 0) == [[], [], [], []]


@pytest.mark.parametrize(
    ("prompts", "new", "temperature", "message"),
    [
        ([[1], []], 3, 0.0, "a prompt is empty"),
        ([[1]], 3, -1.0, "temperature and max_new_tokens must not be negative, got -1.0 and 3"),
        ([[1]], -3, 0.0, "got 0.0 and -3"),
        ([[1], [263, 264]], 3, 0.0, "a prompt holds the token 264, none of the model's 264: tokenise it with"),
        ([[-1]], 3, 0.0, "holds the token -1, none of the model's 264"),
        ([[1], [1] * 60], 5, 0.0, "a prompt of 60 tokens and 5 new ones exceed the 64"),
    ],
)
def test_impossible_requests_are_refused(
    gpt: GPT, prompts: list[list[int]], new: int, temperature: float, message: str
) -> None:
    with pytest.raises(LLMBuilderError, match=message):
        generate(gpt, prompts, new, temperature)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_no_numbers_are_an_error_and_tokens_that_are_kept_out_are_not(
    gpt: GPT, value: float, temperature: float
) -> None:
    gpt.head = nn.Linear(gpt.config.n_embd, 264)
    with torch.no_grad():
        gpt.head.bias[:200] = float("-inf")
    (tokens,) = generate(gpt, [[1]], 5, temperature)
    assert len(tokens) == 5 and min(tokens) >= 200
    with torch.no_grad():
        gpt.head.bias.fill_(value)
    with pytest.raises(LLMBuilderError, match="the model's logits are not finite"):
        generate(gpt, [[1]], 5, temperature)


def test_end_ids_are_the_generation_configs_and_the_tokenizers(
    make_family: Callable[[str], nn.Module], gpt: GPT
) -> None:
    assert end_ids(gpt) == ()
    gpt.tokenizer = byte_tokenizer()
    assert end_ids(gpt) == (256,)
    model = make_family("llama")
    model.tokenizer = byte_tokenizer()
    model.generation_config.eos_token_id = [7, 256]
    assert end_ids(model) == (7, 256)
    model.generation_config.eos_token_id = 9
    assert end_ids(model) == (9, 256)
