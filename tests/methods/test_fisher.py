"""The Fisher diagonal against a formula, and against one backward pass an example."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GPT2Config, GPTNeoXConfig, LlamaConfig, MixtralConfig

from llmbuilder.data import collate
from llmbuilder.errors import LLMBuilderError
from llmbuilder.methods import fisher, per_example
from llmbuilder.methods.fisher import Scores, diagonal_fisher, language_scores
from llmbuilder.models import GPT, GPTConfig
from llmbuilder.nn import LoRAConfig, add_lora

VOCABULARY = 37


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def classifier_scores(model: nn.Module) -> Callable[[Mapping[str, Tensor]], Scores]:
    return lambda batch: Scores(model(batch["x"]), batch["labels"], torch.arange(len(batch["x"])))


def native(**settings: Any) -> nn.Module:
    return GPT(
        GPTConfig(**{"vocab_size": VOCABULARY, "n_layer": 2, "n_head": 2, "n_embd": 16, "block_size": 32} | settings)
    )


def eager(config: Any) -> Any:
    """Experts that compute in fp64 too."""
    config._experts_implementation = "eager"
    return config


def hugging_face(config: Any) -> nn.Module:
    return AutoModelForCausalLM.from_config(config)


def adapted(model: nn.Module, **settings: Any) -> nn.Module:
    add_lora(model, LoRAConfig(**{"rank": 3, "dropout": 0.3} | settings))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:  # B = 0 would leave A without a gradient
                weight.normal_(std=0.3)
    return model


NO_SPECIAL = {"bos_token_id": None, "eos_token_id": None}
SMALL = {**NO_SPECIAL, "vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "native": lambda: native(),
    "native, tied": lambda: native(tie_word_embeddings=True),
    "Llama, tied": lambda: hugging_face(
        LlamaConfig(**SMALL, intermediate_size=24, num_key_value_heads=1, tie_word_embeddings=True)
    ),
    "GPT-2": lambda: hugging_face(
        GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, **NO_SPECIAL)
    ),
    "NeoX": lambda: hugging_face(GPTNeoXConfig(**SMALL, intermediate_size=24)),
    "Mixtral": lambda: hugging_face(
        eager(MixtralConfig(**SMALL, intermediate_size=24, num_key_value_heads=1, num_local_experts=3))
    ),
    "native, LoRA": lambda: adapted(native(), target_modules="all"),
    "GPT-2, LoRA on slices, head, embeddings; biases": lambda: adapted(
        hugging_face(GPT2Config(vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=32, **NO_SPECIAL)),
        target_modules=["attention.query", "attention.value", "mlp", "embeddings"],
        bias="lora_only",
    ),
    "Llama, LoRA and a whole head": lambda: adapted(
        hugging_face(LlamaConfig(**SMALL, intermediate_size=24, num_key_value_heads=1)),
        modules_to_save=["lm_head"],
    ),
}


def make_batch(seed: int, count: int = 5, targets: int | None = None) -> dict[str, Tensor]:
    """Examples of uneven length, some labels masked, one with a single target; or all with as many targets."""
    draw = torch.Generator().manual_seed(seed)
    examples = []
    for i in range(count):
        length = int(torch.randint(4, 12, (), generator=draw))
        ids = torch.randint(VOCABULARY, (length,), generator=draw).tolist()
        masked = length - 1 if i == 1 else int(torch.randint(0, 3, (), generator=draw))
        masked = masked if targets is None else length - targets
        examples.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return collate(examples)


def one_by_one(model: nn.Module, params: dict[str, nn.Parameter], batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The definition: a forward and backward pass an example, without padding; the data's labels."""
    sums = {name: torch.zeros_like(param) for name, param in params.items()}
    tokens = 0
    for ids, labels, mask in zip(batch["input_ids"], batch["labels"], batch["attention_mask"], strict=True):
        length = int(mask.sum())
        logits = model(input_ids=ids[None, :length]).logits[0, :-1]
        wanted = labels[1:length]
        loss = F.cross_entropy(logits, wanted, ignore_index=-100, reduction="sum")
        gradients = torch.autograd.grad(loss, list(params.values()), allow_unused=True)
        for name, gradient in zip(params, gradients, strict=True):
            sums[name] += 0.0 if gradient is None else gradient**2
        tokens += int((wanted != -100).sum())
    return {name: total / tokens for name, total in sums.items()}


@pytest.mark.parametrize("rows", [False, True], ids=["whole layers", "rows of layers"])
@pytest.mark.parametrize("name", MODELS)
def test_fisher_equals_one_backward_pass_an_example(name: str, rows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In fp64 to 1e-6, for models round some things to fp32 in any dtype; in fp32 to rounding: nearly as near to the
    fp64 result as that way is at its worst weight."""
    if rows:
        monkeypatch.setattr(per_example, "EXAMPLES", 1)
        monkeypatch.setattr(per_example, "ROWS", 40)
    model = MODELS[name]().eval()
    batches = [make_batch(seed) for seed in (1, 2)]
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}

    def both_ways() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        head = model.get_output_embeddings()
        batched = diagonal_fisher(model, params, batches, language_scores(model), empirical=True, head=head)
        singles = [one_by_one(model, params, batch) for batch in batches]
        tokens = [int((batch["labels"][:, 1:] != -100).sum()) for batch in batches]
        mean = {of: sum(n * s[of] for n, s in zip(tokens, singles, strict=True)) / sum(tokens) for of in params}
        return batched, mean

    found, single = both_ways()
    model.double()
    found_exactly, exact = both_ways()

    def error(of: str, by: dict[str, Tensor]) -> float:
        return float((by[of] - exact[of]).abs().max() / exact[of].max())

    used = [of for of in params if exact[of].max() > 0]
    assert all("router" in of or "gate" in of for of in params.keys() - set(used))
    # One draw's rounding is luck: by as much as 6 times apart were seen, where a mixed-up example is some 10⁴ times.
    rounding = max(error(of, single) for of in used) + torch.finfo(torch.float32).eps
    for of in used:
        assert error(of, found_exactly) < 1e-6, of
        assert error(of, found) <= 16 * rounding, of


@pytest.mark.parametrize("name", ["native", "native, tied", "Llama, tied"])
def test_fisher_of_examples_of_one_target_each(name: str) -> None:
    """A verdict of one word; the probe, as a run's, has a target at every token and must not be what finds it."""
    model = MODELS[name]().double().eval()
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    batch, probe, head = make_batch(1, targets=1), make_batch(2, targets=3), model.get_output_embeddings()
    found = diagonal_fisher(model, params, [batch], language_scores(model), empirical=True, head=head, probe=probe)
    exact = one_by_one(model, params, batch)
    for of in params:
        assert float((found[of] - exact[of]).abs().max()) < 1e-6 * float(exact[of].max()), of


@pytest.mark.parametrize("name", [name for name in MODELS if name != "Mixtral"])
def test_one_backward_pass_serves_all_parameters(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first two examples, which are done both ways, nothing is done singly."""
    singly: list[set[str]] = []
    add_singly = fisher._add_singly

    def watched(squares: Any, sums: dict[str, Tensor], *rest: Any) -> None:
        singly.append(set(sums))
        add_singly(squares, sums, *rest)

    monkeypatch.setattr(fisher, "_add_singly", watched)
    model = MODELS[name]().eval()
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    batches = [make_batch(1), make_batch(2)]
    diagonal_fisher(model, params, batches, language_scores(model), head=model.get_output_embeddings())
    assert singly == [set(params), set(), set()]


def softmax_regression() -> tuple[nn.Linear, Tensor]:
    model = nn.Linear(4, 3).double()
    with torch.no_grad():
        model.weight.mul_(3.0)
    return model, torch.randn(6, 4, dtype=torch.float64)


def test_fisher_of_softmax_regression_is_the_analytic_one() -> None:
    """E_y (1{y=k} - p_k)² x_j² = p_k (1 - p_k) x_j²; drawn often enough, within five standard errors of it."""
    model, x = softmax_regression()
    repeats = 20_000
    params = dict(model.named_parameters())
    batch = {"x": x.repeat(repeats, 1), "labels": torch.zeros(6 * repeats, dtype=torch.int64)}
    found = diagonal_fisher(model, params, [batch], classifier_scores(model))
    p = model(x).softmax(-1).detach()
    variance = p * (1 - p)
    # (1{y=k} - p_k)² is (1-p_k)² with probability p_k, else p_k²: its own variance is p(1-p)(1-2p)².
    spread = variance * (1 - 2 * p) ** 2
    squares = {"weight": x.square(), "bias": torch.ones(6, 1, dtype=torch.float64)}
    for name, square in squares.items():
        wanted = torch.einsum("ek,ej->kj", variance, square).squeeze() / 6
        error = (torch.einsum("ek,ej->kj", spread, square**2).squeeze() / (36 * repeats)).sqrt()
        assert ((found[name] - wanted).abs() <= 5 * error + 1e-12).all()


def test_fisher_empirical_takes_the_labels_of_the_data() -> None:
    model, x = softmax_regression()
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    batches = [{"x": x[:4], "labels": labels[:4]}, {"x": x[4:], "labels": labels[4:]}]
    found = diagonal_fisher(model, dict(model.named_parameters()), batches, classifier_scores(model), empirical=True)
    residual = F.one_hot(labels, 3) - model(x).softmax(-1).detach()
    assert torch.allclose(found["weight"], torch.einsum("ek,ej->kj", residual**2, x**2) / 6, rtol=1e-12, atol=0)
    assert torch.allclose(found["bias"], (residual**2).mean(0), rtol=1e-12, atol=0)


def test_fisher_draws_by_its_seed_alone_and_leaves_all_as_it_was() -> None:
    model = adapted(native(), target_modules="all").eval()
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    before = {n: (p.detach().clone(), p.requires_grad) for n, p in model.named_parameters()}
    random_state = torch.get_rng_state()

    def run(seed: int) -> dict[str, Tensor]:
        return diagonal_fisher(
            model, params, [make_batch(3)], language_scores(model), seed=seed, head=model.get_output_embeddings()
        )

    first, same, other = run(0), run(0), run(1)
    assert all(torch.equal(first[name], same[name]) for name in params)
    assert any(not torch.equal(first[name], other[name]) for name in params)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(torch.equal(p, before[n][0]) and p.requires_grad == before[n][1] for n, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


class Odd(nn.Module):
    """A classifier that uses one layer twice, another's weight behind its back, and a norm that torch does not know."""

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.randn(5))

        def forward(self, x: Tensor) -> Tensor:
            return x * (1 + self.scale) / x.square().mean(-1, keepdim=True).add(1e-5).sqrt()

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.hidden, self.scale, self.out = nn.Linear(5, 5), nn.Linear(5, 5), self.Scale(), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.twice(torch.tanh(self.twice(x))))
        x = self.scale(torch.tanh(self.hidden(x) + F.linear(x, self.hidden.weight)))
        return self.out(x)


@pytest.mark.parametrize("probed", [False, True], ids=["first two", "probe"])
def test_fisher_is_right_where_parameters_are_used_in_odd_ways(probed: bool) -> None:
    model = Odd().double()
    params = dict(model.named_parameters())
    x, labels = torch.randn(7, 5, dtype=torch.float64), torch.randint(3, (7,))
    batch = {"x": x, "labels": labels}
    probe = {"x": torch.randn(2, 5, dtype=torch.float64), "labels": labels[:2]} if probed else None
    found = diagonal_fisher(model, params, [batch], classifier_scores(model), empirical=True, probe=probe)
    for name, param in params.items():
        squares = [
            torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), labels[i : i + 1]), param)[0] ** 2
            for i in range(7)
        ]
        assert torch.allclose(found[name], torch.stack(squares).mean(0), rtol=1e-9, atol=1e-15), name


def test_a_model_that_has_diverged_is_refused() -> None:
    model, x = softmax_regression()
    with torch.no_grad():
        model.bias[0] = float("nan")
    batch = {"x": x, "labels": torch.zeros(6, dtype=torch.int64)}
    with pytest.raises(LLMBuilderError, match="not finite"):
        diagonal_fisher(model, dict(model.named_parameters()), [batch], classifier_scores(model))
    assert all(param.requires_grad for param in model.parameters())


def test_logits_whose_sum_half_precision_cannot_hold_are_finite() -> None:
    """The residuals' squares, of the same fp16 logits in fp64; each is a number near 2/3 or 1/3, rounded to fp16."""
    model = nn.Linear(4, 3).half()
    with torch.no_grad():
        model.bias.fill_(3e4)  # 18 of them are beyond 65504
    labels = torch.tensor([0, 1, 2, 2, 1, 0])
    batch = {"x": torch.randn(6, 4).half(), "labels": labels}
    found = diagonal_fisher(model, {"bias": model.bias}, [batch], classifier_scores(model), empirical=True)
    residual = F.one_hot(labels, 3) - model(batch["x"]).detach().double().softmax(-1)
    assert torch.allclose(found["bias"].double(), (residual**2).mean(0), rtol=2**-8, atol=0)


def test_fisher_of_data_without_targets_is_zero() -> None:
    model = native().eval()
    batch = make_batch(1)
    batch["labels"].fill_(-100)
    found = diagonal_fisher(
        model, dict(model.named_parameters()), [batch], language_scores(model), head=model.get_output_embeddings()
    )
    assert all(not value.any() for value in found.values())


@pytest.mark.parametrize("rows", [False, True], ids=["whole layers", "rows of layers"])
@pytest.mark.parametrize("name", ["native", "Llama, tied", "native, LoRA"])
def test_fisher_under_autocast_is_that_of_fp32_but_for_its_rounding(
    name: str, rows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As near to the fp32 result as one backward pass an example is under autocast, at its worst parameter."""
    if rows:
        monkeypatch.setattr(per_example, "EXAMPLES", 1)
        monkeypatch.setattr(per_example, "ROWS", 40)
    model = MODELS[name]().eval()
    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    batch = make_batch(1)
    with torch.autocast("cpu", torch.bfloat16):
        found = diagonal_fisher(
            model, params, [batch], language_scores(model), empirical=True, head=model.get_output_embeddings()
        )
        singly = one_by_one(model, params, batch)
    exact = one_by_one(model, params, batch)

    def error(of: str, by: dict[str, Tensor]) -> float:
        return float((by[of] - exact[of]).abs().sum() / exact[of].sum())

    rounding = max(error(of, singly) for of in params)
    assert rounding > 0
    for of in params:
        assert found[of].dtype == torch.float32
        assert error(of, found) <= 2 * rounding, of


class Mixed(nn.Module):
    """Parts that have a weight and a layer of their own, one of them with a second argument; and a layer that reads
    what is no example."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale, self.layer = nn.Parameter(torch.randn(5)), nn.Linear(5, 5)

        def forward(self, x: Tensor, shift: Tensor | float = 0.0) -> Tensor:
            return self.layer(x * self.scale + shift)

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.bank = self.Inner(), self.Inner(), nn.Linear(5, 5)
        self.register_buffer("constant", torch.randn(4, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.second(x, 2 * x) + self.bank(self.constant).sum(0)


@pytest.mark.parametrize("size", [3, 4])  # the last batch is of one example; the constant is as long as a batch
def test_fisher_is_right_where_modules_hold_others_or_read_no_examples(size: int) -> None:
    model = Mixed().double()
    params = dict(model.named_parameters())
    x, labels = torch.randn(7, 5, dtype=torch.float64), torch.randint(5, (7,))
    batches = [{"x": x[i : i + size], "labels": labels[i : i + size]} for i in range(0, 7, size)]
    found = diagonal_fisher(model, params, batches, classifier_scores(model), empirical=True)
    for name, param in params.items():
        squares = [
            torch.autograd.grad(F.cross_entropy(model(x[i : i + 1]), labels[i : i + 1]), param)[0] ** 2
            for i in range(7)
        ]
        assert torch.allclose(found[name], torch.stack(squares).mean(0), rtol=1e-9, atol=1e-15), name
