"""Layers with adapters against their formula in fp64, in every shape that a model can have them."""

import copy
from collections.abc import Callable

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers.pytorch_utils import Conv1D

from llmbuilder import ops
from llmbuilder.nn import LoRAConfig, LoRAEmbedding, LoRALinear, activate_adapters, add_lora
from llmbuilder.nn.lora import Update
from llmbuilder.ops.dropout import seed_like

Shuffle = Callable[[nn.Module], nn.Module]


def layer_of(base: nn.Module, *configs: LoRAConfig, shuffle: Shuffle) -> tuple[nn.Sequential, LoRALinear]:
    """A model of one layer, with an adapter for each config, all active."""
    model = nn.Sequential(base)
    for i, config in enumerate(configs):
        add_lora(model, config, name=f"a{i}")
        shuffle(model)
    activate_adapters(model, [f"a{i}" for i in range(len(configs))])
    assert isinstance(model[0], LoRALinear | LoRAEmbedding)
    return model, model[0]


def update(layer: LoRALinear, name: str) -> Update:
    found = layer.adapters[name]
    assert isinstance(found, Update)
    return found


def formula(layer: LoRALinear, x: Tensor, keep: Tensor | float = 1.0) -> Tensor:
    """base(x) + Σ scaling · (x ∘ keep) Aᵀ Bᵀ in fp64."""
    weight = layer.weight.double().t() if isinstance(layer.base, Conv1D) else layer.weight.double()
    y = F.linear(x.double(), weight, None if layer.bias is None else layer.bias.double())
    for name in layer.adapters:
        share = update(layer, name)
        y = (
            y
            + share.scaling
            * (x.double() * keep)
            @ share.lora_A["weight"].double().t()
            @ share.lora_B["weight"].double().t()
        )
    return y


def check(actual: Tensor, exact: Tensor, plain: Tensor) -> None:
    """max|out − ref64| <= 2 · max|torch in the same dtype − ref64| + one ulp of max|ref64|."""
    eps = torch.finfo(actual.dtype).eps
    bound = 2 * float((plain.double() - exact).abs().max()) + eps * float(exact.abs().max())
    assert float((actual.double() - exact).abs().max()) <= bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("base", [nn.Linear(24, 40), nn.Linear(24, 40, bias=False), Conv1D(40, 24)])
def test_the_output_is_the_formula(base: nn.Module, dtype: torch.dtype, shuffle: Shuffle) -> None:
    model, layer = layer_of(copy.deepcopy(base).to(dtype), LoRAConfig(rank=3, target_modules=["0"]), shuffle=shuffle)
    x = torch.randn(2, 5, 24).to(dtype)
    with torch.no_grad():
        share = update(layer, "a0")
        A, B = (matrix["weight"].to(dtype) for matrix in (share.lora_A, share.lora_B))
        plain = layer.base(x) + share.scaling * (x @ A.t() @ B.t())
        check(model(x), formula(layer, x), plain)


def test_adapters_are_fp32_beside_a_bf16_base_and_get_fp32_gradients(shuffle: Shuffle) -> None:
    model, layer = layer_of(nn.Linear(16, 8).bfloat16(), LoRAConfig(rank=2, target_modules=["0"]), shuffle=shuffle)
    y = model(torch.randn(4, 16).bfloat16())
    assert y.dtype == torch.bfloat16
    y.float().square().sum().backward()
    for parameter in layer.adapters.parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert parameter.grad.abs().max() > 0


def test_the_mask_is_that_of_the_operator_and_is_drawn_at_each_call(shuffle: Shuffle) -> None:
    model, layer = layer_of(nn.Linear(64, 8), LoRAConfig(rank=2, dropout=0.5, target_modules=["0"]), shuffle=shuffle)
    x = torch.randn(7, 64)
    model.train()
    torch.manual_seed(5)
    first, second = model(x), model(x)
    torch.manual_seed(5)
    for y in (first, second):
        keep = ops.dropout(torch.ones(7, 64), 0.5, seed_like(x)).double()
        torch.testing.assert_close(y.double(), formula(layer, x, keep), rtol=1e-5, atol=1e-5)
    assert not torch.equal(first, second)


def test_there_is_no_dropout_in_evaluation_mode(shuffle: Shuffle) -> None:
    model, layer = layer_of(nn.Linear(64, 8), LoRAConfig(rank=2, dropout=0.5, target_modules=["0"]), shuffle=shuffle)
    x = torch.randn(7, 64)
    torch.testing.assert_close(model.eval()(x).double(), formula(layer, x), rtol=1e-5, atol=1e-5)


def test_several_adapters_add_up(shuffle: Shuffle) -> None:
    configs = [LoRAConfig(rank=r, alpha=a, target_modules=["0"]) for r, a in ((2, 4), (3, 1.5), (1, 2))]
    model, layer = layer_of(nn.Linear(24, 40), *configs, shuffle=shuffle)
    x = torch.randn(5, 24)
    torch.testing.assert_close(model(x).double(), formula(layer, x), rtol=1e-5, atol=1e-5)


def test_weights_scale_each_adapter(shuffle: Shuffle) -> None:
    configs = [LoRAConfig(rank=2, target_modules=["0"]), LoRAConfig(rank=3, target_modules=["0"])]
    model, layer = layer_of(nn.Linear(24, 40), *configs, shuffle=shuffle)
    x = torch.randn(5, 24)
    base = layer.base(x)
    deltas = []
    for name in ("a0", "a1"):
        activate_adapters(model, name)
        deltas.append(model(x) - base)
    activate_adapters(model, {"a0": 0.25, "a1": -2.0})
    torch.testing.assert_close(model(x), base + 0.25 * deltas[0] - 2 * deltas[1], rtol=1e-4, atol=1e-4)
    activate_adapters(model, {"a0": 0.0})
    assert torch.equal(model(x), base)


def test_adapters_of_different_dropout_have_masks_of_their_own(shuffle: Shuffle) -> None:
    configs = [LoRAConfig(rank=2, dropout=p, target_modules=["0"]) for p in (0.0, 0.5)]
    model, layer = layer_of(nn.Linear(24, 8), *configs, shuffle=shuffle)
    model.train()
    x = torch.randn(3, 24)
    torch.manual_seed(1)
    y = model(x)
    torch.manual_seed(1)
    keep = ops.dropout(torch.ones(3, 24), 0.5, seed_like(x))
    parts = [update(layer, name) for name in ("a0", "a1")]
    (A0, B0), (A1, B1) = (part.matrices() for part in parts)
    expected = layer.base(x) + parts[0].scaling * x @ A0.t() @ B0.t() + parts[1].scaling * (x * keep) @ A1.t() @ B1.t()
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_untrained_adapter_leaves_the_layer_as_it_is(dtype: torch.dtype) -> None:
    """Bit for bit, where the frozen product is taken by the same path."""
    model = nn.Sequential(nn.Linear(512, 384).to(dtype)).requires_grad_(False)
    x = torch.randn(64, 512).to(dtype)
    before = ops.frozen_linear(x, model[0].weight, model[0].bias)
    add_lora(model, LoRAConfig(rank=4, dropout=0.3, target_modules=["0"]))
    assert torch.equal(model.train()(x), before)


def test_a_starts_kaiming_uniform_and_b_zero() -> None:
    model = nn.Sequential(nn.Linear(400, 300))
    add_lora(model, LoRAConfig(rank=100, target_modules=["0"]))
    share = update(model[0], "default")
    A = share.lora_A["weight"].detach()
    bound = 1 / 400**0.5  # gain of a = sqrt(5) is sqrt(1/3), times sqrt(3 / fan_in)
    assert 0.99 * bound < float(A.abs().max()) <= bound
    assert abs(float(A.std()) - bound / 3**0.5) < 0.01 * bound
    assert not share.lora_B["weight"].any()


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3"])
def test_a_part_of_a_fused_layer_moves_its_rows_only(
    name: str, make: Callable[[str], nn.Module], shuffle: Shuffle
) -> None:
    from llmbuilder.models.names import part_rows

    model = make(name)
    add_lora(model, LoRAConfig(rank=3, target_modules=["attention.value", "attention.query"]))
    shuffle(model)
    path, layer = next((path, m) for path, m in model.named_modules() if isinstance(m, LoRALinear))
    rows = part_rows(model, path)
    x = torch.randn(5, layer.in_features)
    difference = layer(x) - layer.base(x)
    share = update(layer, "default")
    assert set(share.lora_A) == {"query", "value"}
    assert not difference[:, rows["key"]].any()
    for part in ("query", "value"):
        delta = share.scaling * x @ share.lora_A[part].t() @ share.lora_B[part].t()
        torch.testing.assert_close(difference[:, rows[part]], delta, rtol=1e-4, atol=1e-4)
    difference.square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in layer.adapters.parameters())


class Doubled(nn.Linear):
    """A linear layer that does more than its weight says."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def test_a_base_with_a_forward_of_its_own_is_called(shuffle: Shuffle) -> None:
    model, layer = layer_of(Doubled(24, 40), LoRAConfig(rank=2, target_modules=["0"]), shuffle=shuffle)
    x = torch.randn(5, 24)
    share = update(layer, "a0")
    expected = (
        2 * F.linear(x, layer.weight, layer.bias)
        + share.scaling * x @ share.matrices()[0].t() @ share.matrices()[1].t()
    )
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)


def test_hooks_on_the_base_still_run(shuffle: Shuffle) -> None:
    base = nn.Linear(24, 40)
    seen: list[Tensor] = []
    base.register_forward_hook(lambda _, inputs, output: seen.append(output))
    model, layer = layer_of(base, LoRAConfig(rank=2, target_modules=["0"]), shuffle=shuffle)
    x = torch.randn(5, 24)
    torch.testing.assert_close(model(x).double(), formula(layer, x), rtol=1e-5, atol=1e-5)
    assert torch.equal(seen[0], F.linear(x, layer.weight, layer.bias))


def test_a_layer_that_stands_at_two_places_is_wrapped_once_and_serves_both(shuffle: Shuffle) -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"first": shared, "block": nn.ModuleDict({"second": shared})})
    add_lora(model, LoRAConfig(rank=2, target_modules=["second"]))
    shuffle(model)
    first, second = model["first"], model["block"]["second"]  # type: ignore[index]
    assert isinstance(first, LoRALinear)
    assert first is second
    x = torch.randn(3, 8)
    first(second(x)).square().sum().backward()
    gradient = [parameter.grad.clone() for parameter in first.adapters.parameters()]
    exact = first.double()
    exact.zero_grad()
    formula(exact, formula(exact, x)).square().sum().backward()
    for parameter, grad in zip(exact.adapters.parameters(), gradient, strict=True):
        torch.testing.assert_close(grad.double(), parameter.grad.double(), rtol=1e-3, atol=1e-4)


def test_a_layer_called_twice_sums_its_gradients(shuffle: Shuffle) -> None:
    _, layer = layer_of(nn.Linear(8, 8), LoRAConfig(rank=2, target_modules=["0"]), shuffle=shuffle)
    x = torch.randn(3, 8)
    (layer(x) + layer(-2 * x)).sum().backward()
    together = [parameter.grad.clone() for parameter in layer.adapters.parameters()]
    layer.zero_grad()
    layer(x).sum().backward()
    layer(-2 * x).sum().backward()
    for parameter, grad in zip(layer.adapters.parameters(), together, strict=True):
        torch.testing.assert_close(parameter.grad, grad)


def test_recomputed_activations_see_the_same_mask(shuffle: Shuffle) -> None:
    config = LoRAConfig(rank=2, dropout=0.5, target_modules=["0", "2"])
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    add_lora(model, config)
    shuffle(model).train()
    x = torch.randn(6, 16)
    gradients = []
    for run in (model, lambda x: checkpoint(model, x, use_reentrant=False)):
        torch.manual_seed(3)
        model.zero_grad()
        run(x).square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize("scaled", [False, True])
def test_an_embedding_adds_the_adapters_rows(scaled: bool, shuffle: Shuffle) -> None:
    base = nn.Embedding(31, 8)
    if scaled:
        config = transformers.GemmaConfig(
            vocab_size=31, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, head_dim=8
        )
        base = transformers.AutoModelForCausalLM.from_config(config).get_input_embeddings()
    model, layer = layer_of(base, LoRAConfig(rank=2, target_modules=["0"]), shuffle=shuffle)
    share = update(layer, "a0")
    A, B = share.matrices()
    ids = torch.randint(1, 31, (2, 5))
    scale = 8**0.5 if scaled else 1.0
    expected = scale * F.embedding(ids, layer.weight + share.scaling * (B @ A).t())
    torch.testing.assert_close(model(ids), expected, rtol=1e-5, atol=1e-5)


def test_an_embeddings_adapter_starts_at_zero() -> None:
    model = nn.Sequential(nn.Embedding(31, 8))
    ids = torch.randint(31, (2, 5))
    before = model(ids)
    add_lora(model, LoRAConfig(rank=2, target_modules=["0"]))
    assert torch.equal(model(ids), before)
    assert model[0].adapters["default"].lora_B["weight"].std() > 0.5


def test_a_wrapped_layer_shows_what_its_base_has(shuffle: Shuffle) -> None:
    for base in (nn.Linear(24, 40), Conv1D(40, 24)):
        _, layer = layer_of(base, LoRAConfig(rank=2, target_modules=["0"]), shuffle=shuffle)
        assert layer.weight is base.weight
        assert layer.bias is base.bias
        assert (layer.in_features, layer.out_features) == (24, 40)
    embedding = nn.Embedding(31, 8, padding_idx=3)
    _, layer = layer_of(embedding, LoRAConfig(rank=2, target_modules=["0"]), shuffle=shuffle)
    assert layer.weight is embedding.weight
    assert (layer.num_embeddings, layer.embedding_dim, layer.padding_idx) == (31, 8, 3)  # type: ignore[union-attr]


def test_a_deep_copy_is_a_model_of_its_own(
    adapted: Callable[..., nn.Module], logits: Callable[[nn.Module], Tensor]
) -> None:
    config = LoRAConfig(rank=2, target_modules="all", bias="all", modules_to_save=["lm_head"])
    model = adapted("qwen2", config)
    twin = copy.deepcopy(model)
    before = logits(model)
    assert torch.equal(logits(twin), before)
    activate_adapters(twin, [])
    assert not torch.equal(logits(twin), before)
    assert torch.equal(logits(model), before)


def test_a_state_dict_restores_a_model_with_adapters(
    adapted: Callable[..., nn.Module], make: Callable[[str], nn.Module], logits: Callable[[nn.Module], Tensor]
) -> None:
    config = LoRAConfig(rank=2, target_modules=["attention", "embeddings"], modules_to_save=["ln_f"])
    model = adapted("gpt2", config)
    other = make("gpt2")
    add_lora(other, config)
    other.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(other), logits(model))


def test_the_compiler_takes_it_as_one_graph(shuffle: Shuffle) -> None:
    configs = [
        LoRAConfig(rank=2, dropout=0.5, target_modules=["0"]),
        LoRAConfig(rank=3, dropout=0.5, target_modules=["0"]),
    ]
    model, _ = layer_of(nn.Linear(16, 8), *configs, shuffle=shuffle)
    model.train()
    x = torch.randn(4, 16)
    torch.manual_seed(2)
    eager = model(x)
    torch.manual_seed(2)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, eager)
