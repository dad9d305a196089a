"""LanguageHead against the models' own losses, and against whole logits."""

import warnings
from collections.abc import Mapping

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from llmbuilder.data import collate
from llmbuilder.errors import LLMBuilderError
from llmbuilder.nn import LanguageHead, LoRAConfig, add_lora
from llmbuilder.nn import heads as heads_module
from llmbuilder.ops import cross_entropy

VOCAB = 61


def batch_of(*lengths: int, width: int | None = None) -> dict[str, torch.Tensor]:
    """Padded rows of random tokens; the first two of each are a prompt, without targets."""
    ids = [torch.randint(VOCAB, (n,)).tolist() for n in lengths]
    return collate([{"input_ids": row, "labels": [-100] * 2 + row[2:]} for row in ids])


def whole(model: nn.Module, batch: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Logits [n, V] at the positions that have a target, the targets, and their summed loss, the long way."""
    logits = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    kept = batch["labels"][:, 1:] != -100
    logits, targets = logits[:, :-1][kept].float(), batch["labels"][:, 1:][kept]
    return logits, targets, F.cross_entropy(logits, targets, reduction="sum")


def gradients(model: nn.Module, loss: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def check_equal(model: nn.Module, batch: Mapping[str, torch.Tensor], rtol: float = 2e-5) -> None:
    """loss_sum and score are what whole logits give, and so is every parameter's gradient."""
    head = LanguageHead(model)
    logits, targets, expected = whole(model, batch)
    expected_gradients = gradients(model, expected)
    total, count = head.loss_sum(batch)
    got = gradients(model, total)

    assert count == len(targets)
    assert total.dtype == torch.float32
    torch.testing.assert_close(total, expected, rtol=rtol, atol=1e-5)
    assert got.keys() == expected_gradients.keys()
    assert got, "something trains"
    for name, grad in got.items():
        right = expected_gradients[name]
        assert (grad - right).norm() <= rtol * right.norm() + 1e-6, name
    loss, correct, count = head.score(batch)
    assert (correct, count) == (int((logits.argmax(-1) == targets).sum()), len(targets))
    assert loss == pytest.approx(float(expected.detach()), rel=rtol, abs=1e-5)


@pytest.mark.filterwarnings("error")
def test_the_loss_and_gradients_are_the_models_own(make, family):
    model, batch = make(family), batch_of(9, 5, 7)
    check_equal(model, batch)
    total, count = LanguageHead(model).loss_sum(batch)
    own = model(**batch).loss
    torch.testing.assert_close(total / count, own, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_head_that_trains_gets_its_gradient_tied_or_not(tied):
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
    check_equal(model, batch_of(9, 6))


def test_a_soft_cap_and_a_bias_reach_the_loss(make):
    """Broken, both would go unnoticed where the cap is wide and the bias zero."""
    gemma, phi, batch = make("gemma2"), make("phi"), batch_of(9, 6)
    gemma.config.final_logit_softcapping = 0.5
    assert float(whole(gemma, batch)[0].detach().abs().max()) <= 0.5
    check_equal(gemma, batch)
    with torch.no_grad():
        phi.lm_head.bias.normal_(std=3)
    check_equal(phi, batch)


def scaled_logits(name):
    shape = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    config = {
        "cohere": lambda: transformers.CohereConfig(**shape, pad_token_id=0, bos_token_id=1, eos_token_id=2),
        "granite": lambda: transformers.GraniteConfig(**shape, logits_scaling=4.0),
    }
    return transformers.AutoModelForCausalLM.from_config(config[name]())


@pytest.mark.parametrize("name", ["cohere", "granite"])
def test_a_model_that_scales_its_logits_is_served_by_its_own_logits_and_says_so_once(name):
    model, batch = scaled_logits(name), batch_of(9, 6)
    with pytest.warns(UserWarning, match="logits are not the output of its output layer") as said:
        head = LanguageHead(model)
        head.loss_sum(batch)
        head.score(batch)
    assert len(said) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        check_equal(model, batch)


class Bigrams(nn.Module):
    """A model without a head that can be named: each token's row of a table is the next one's logits."""

    def __init__(self):
        super().__init__()
        self.config = transformers.PretrainedConfig(vocab_size=VOCAB)
        self.table = nn.Embedding(VOCAB, VOCAB)

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        return transformers.modeling_outputs.CausalLMOutput(logits=self.table(input_ids))


class Twice(Bigrams):
    """A model that runs its head two times."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(VOCAB, VOCAB)

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None, use_cache=None):
        x = self.table(input_ids)
        return transformers.modeling_outputs.CausalLMOutput(logits=self.head(x) + self.head(-x))


@pytest.mark.parametrize("model, reason", [(Bigrams, "no output embeddings"), (Twice, "runs 2 times")])
def test_a_model_without_a_head_to_intercept_is_served_by_its_own_logits(model, reason):
    model = model()
    with pytest.warns(UserWarning, match=reason):
        check_equal(model, batch_of(9, 6))


@pytest.mark.parametrize("family", ["llama", "gemma2", "native"])
def test_a_head_with_lora_of_its_own(make, family, shuffle, monkeypatch):
    model = make(family)
    names = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    if family != "llama":  # tied: the adapter is the head's alone
        names = [name.split(".")[-1] for name in names]
    add_lora(model, LoRAConfig(rank=4, target_modules=names))
    shuffle(model)
    assert type(model.get_output_embeddings()) is not nn.Linear
    monkeypatch.setattr(heads_module, "chunk_rows", lambda vocabulary, dtype: 5)
    check_equal(model, batch_of(9, 6, 8))


@pytest.mark.parametrize("with_lora", [False, True])
def test_weights_are_factors_of_the_targets_losses(make, shuffle, monkeypatch, with_lora):
    """By the fused operator and by chunks; a weight belongs to the label at its position."""
    monkeypatch.setattr(heads_module, "chunk_rows", lambda vocabulary, dtype: 5)
    model, batch = make("llama"), batch_of(9, 5, 7)
    if with_lora:
        add_lora(model, LoRAConfig(rank=4, target_modules=["lm_head", "q_proj"]))
        shuffle(model)
    weights = torch.rand(batch["labels"].shape)
    logits, targets, plain = whole(model, batch)
    factors = weights[:, 1:][batch["labels"][:, 1:] != -100]
    expected = (F.cross_entropy(logits, targets, reduction="none") * factors).sum()
    total, count = LanguageHead(model).loss_sum(batch | {"weights": weights})
    assert count == len(targets)
    torch.testing.assert_close(total, expected, rtol=2e-5, atol=1e-5)
    right = gradients(model, expected)
    got = gradients(model, total)
    assert got.keys() == right.keys()
    for name, grad in got.items():
        assert (grad - right[name]).norm() <= 2e-5 * right[name].norm() + 1e-6, name
    ones, _ = LanguageHead(model).loss_sum(batch | {"weights": torch.ones_like(weights)})
    assert torch.equal(ones, LanguageHead(model).loss_sum(batch)[0])
    assert not torch.allclose(total, plain)


@pytest.mark.parametrize("options", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head"]}, {}])
def test_models_that_peft_wrapped(make, options):
    model = get_peft_model(make("llama"), LoraConfig(r=4, task_type="CAUSAL_LM", **options))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn_like(parameter))
    check_equal(model.eval(), batch_of(9, 6))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_documents_have_the_loss_that_they_have_alone(make, family, attention):
    model = make(family)
    attend_by(model, attention)
    documents = [torch.randint(VOCAB, (n,)).tolist() for n in (5, 3, 7, 4)]
    examples = [{"input_ids": ids, "labels": ids} for ids in documents]
    packed = collate(examples, "packing", max_length=12)
    assert packed["attention_mask"].shape == (2, 1, 12, 12)
    check_packed(model, packed, documents)


def test_packed_documents_do_not_feel_torch_s_default_dtype(make):
    model = make("llama")
    attend_by(model, "eager")
    packed = collate([{"input_ids": ids, "labels": ids} for ids in ([3, 4, 5], [6, 7])], "packing", max_length=8)
    expected = LanguageHead(model).loss_sum(packed)[0]
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(LanguageHead(model).loss_sum(packed)[0], expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["mistral", "gemma2", "gemma3", "phi3"])
def test_packed_documents_keep_to_the_sliding_window(make, family, attention):
    model = make(family)
    attend_by(model, attention)
    for module in model.modules():
        if getattr(module, "sliding_window", None) is not None:
            module.sliding_window = 3
    model.config.sliding_window = 3
    documents = [torch.randint(VOCAB, (n,)).tolist() for n in (7, 5)]
    packed = collate([{"input_ids": ids, "labels": ids} for ids in documents], "packing", max_length=12)
    check_packed(model, packed, documents)


STATE = {"vocab_size": VOCAB, "hidden_size": 16, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2, "intermediate_size": 24, "pad_token_id": 0}
UNPACKABLE = {
    "recurrent": lambda: transformers.RwkvConfig(**STATE, attention_hidden_size=16),
    "convolutional": lambda: transformers.Lfm2Config(**STATE, **HEADS, layer_types=["conv", "full_attention"]),
    "alibi": lambda: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2),
    "state space": lambda: transformers.MambaConfig(**STATE, state_size=4),
}


@pytest.mark.parametrize("kind", UNPACKABLE)
def test_a_model_that_cannot_keep_packed_documents_apart_refuses_them(kind):
    model = transformers.AutoModelForCausalLM.from_config(UNPACKABLE[kind]())
    with torch.no_grad():  # at transformers' start, layers hardly change what passes them
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    documents = [torch.randint(1, VOCAB, (n,)).tolist() for n in (5, 7)]
    packed = collate([{"input_ids": ids, "labels": ids} for ids in documents], "packing", max_length=12)
    for compute in (LanguageHead(model).loss_sum, LanguageHead(model).score):
        with pytest.raises(LLMBuilderError, match=f"{type(model).__name__} can't train on packed examples"):
            compute(packed)
    check_equal(model, batch_of(5, 7))


def test_packed_rows_beyond_a_chunk_of_attention_are_refused():
    experts = {"num_local_experts": 2, "intermediate_size_mlp": 24, "head_dim": 8, "attention_chunk_size": 10}
    config = transformers.Llama4TextConfig(**STATE, **HEADS, **experts)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    documents = [torch.randint(1, VOCAB, (n,)).tolist() for n in (5, 7)]
    examples = [{"input_ids": ids, "labels": ids} for ids in documents]
    with pytest.raises(LLMBuilderError, match="chunks of 10 tokens, which packed rows of 12 exceed"):
        LanguageHead(model).loss_sum(collate(examples, "packing", max_length=12))
    short = collate(examples, "packing", max_length=7)
    check_packed(model, short, documents)


def attend_by(model, attention):
    """Choose transformers' way of attention, where the model has it; the native model has one."""
    if getattr(model, f"_supports_{attention}", attention == "eager") and hasattr(model, "set_attn_implementation"):
        model.set_attn_implementation(attention)


def check_packed(model, packed, documents):
    alone = [torch.tensor([ids]) for ids in documents]
    losses = [whole(model, {"input_ids": ids, "labels": ids})[2] for ids in alone]
    expected = gradients(model, sum(losses))
    total, count = LanguageHead(model).loss_sum(packed)
    got = gradients(model, total)
    assert count == sum(len(ids) - 1 for ids in documents)
    torch.testing.assert_close(total, sum(losses), rtol=2e-5, atol=1e-5)
    for name, grad in got.items():
        assert (grad - expected[name]).norm() <= 1e-4 * expected[name].norm() + 1e-6, name


def test_no_target_at_all_is_zero_with_gradients_of_zero(make):
    for model in (make("llama"), scaled_logits("granite")):
        batch = batch_of(6, 4)
        batch["labels"].fill_(-100)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            head = LanguageHead(model)
            total, count = head.loss_sum(batch)
        assert (float(total.detach()), count) == (0.0, 0)
        assert not any(grad.any() for grad in gradients(model, total).values())
        assert head.score(batch) == (0.0, 0, 0)


def test_the_shift_is_by_one():
    """Bigrams that always say 'the next token is one more' are right exactly where the data does so."""
    model = Bigrams()
    with torch.no_grad():
        model.table.weight.copy_(20 * torch.eye(VOCAB).roll(1, 1))
    ids = torch.tensor([[3, 4, 5, 9, 10]])
    with pytest.warns(UserWarning):
        loss, correct, count = LanguageHead(model).score({"input_ids": ids, "labels": ids})
    assert (correct, count) == (3, 4)
    assert loss == pytest.approx(20, abs=1e-3)


class Largest(TorchDispatchMode):
    """The shapes of what operators return inside."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, torch.Tensor):
                self.shapes.add(tuple(t.shape))
        return result


@pytest.mark.parametrize("with_lora", [False, True])
def test_no_logits_of_more_than_a_chunk_of_positions(make, shuffle, monkeypatch, with_lora):
    monkeypatch.setattr(cross_entropy, "chunk_rows", lambda vocabulary, dtype: 4)
    monkeypatch.setattr(heads_module, "chunk_rows", lambda vocabulary, dtype: 4)
    model = make("llama")
    add_lora(model, LoRAConfig(rank=3, target_modules=["q_proj", *(["lm_head"] if with_lora else [])]))
    shuffle(model)
    head, batch = LanguageHead(model), batch_of(20, 20)
    head.loss_sum(batch)  # the probe
    saved = []
    with Largest() as seen, torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        head.loss_sum(batch)[0].backward()
        head.score(batch)
    assert not any(shape and shape[-1] == VOCAB for shape in saved), "no chunk's logits wait for the backward pass"
    rows = {torch.Size(shape[:-1]).numel() for shape in seen.shapes if shape and shape[-1] == VOCAB}
    assert max(rows - {32}, default=0) <= 4, "[4, VOCAB] at most ([32, VOCAB] is a transposed weight)"


def test_scoring_builds_no_graph(make):
    head = LanguageHead(make("llama"))
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        head.score(batch_of(9, 6))
    assert not saved


def test_the_probe_leaves_no_trace(make):
    model = make("gpt2")
    model.transformer.drop.p = 0.3
    model.train()
    model.transformer.h[0].eval()
    modes = [module.training for module in model.modules()]
    state = torch.get_rng_state()
    head = LanguageHead(model)
    assert head._is_interceptable
    assert torch.equal(torch.get_rng_state(), state)
    assert [module.training for module in model.modules()] == modes
    assert "forward" not in vars(model.lm_head)


def test_an_exception_in_the_model_leaves_its_head_as_it_was(make):
    model, batch = make("llama"), batch_of(6, 4)
    head = LanguageHead(model)
    head.score(batch)
    before = whole(model, batch)[0]
    with pytest.raises(IndexError):
        head.loss_sum({**batch, "input_ids": batch["input_ids"] + 10_000})
    assert "forward" not in vars(model.lm_head)
    assert torch.equal(whole(model, batch)[0], before)


def test_a_call_within_a_call_and_a_forward_of_the_instances_own_survive(make):
    model, batch, other = make("llama"), batch_of(6, 4), batch_of(8, 3)
    expected, expected_other = LanguageHead(model).score(batch), LanguageHead(model).score(other)
    inner, own = [], model.lm_head.forward

    def within(module, args, output):
        if not inner:
            inner.append(None)
            inner[0] = LanguageHead(model).score(other)

    model.model.layers[0].register_forward_hook(within)
    model.lm_head.forward = own
    assert LanguageHead(model).score(batch) == expected
    assert inner == [expected_other]
    assert vars(model.lm_head)["forward"] is own


@pytest.mark.parametrize("family", ["llama", "native"])
def test_under_gradient_checkpointing_and_dropout_the_loss_is_the_same(make, family):
    model, batch = make(family), batch_of(9, 6)
    add_lora(model, LoRAConfig(rank=4, dropout=0.3))
    model.train()
    outcomes = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            model.get_input_embeddings().weight.requires_grad_(False)
        torch.manual_seed(3)
        total, _ = LanguageHead(model).loss_sum(batch)
        outcomes.append((total.detach(), gradients(model, total)))
    (plain, plain_gradients), (saved, saved_gradients) = outcomes
    assert torch.equal(plain, saved)
    assert plain_gradients.keys() == saved_gradients.keys()
    for name, grad in plain_gradients.items():
        torch.testing.assert_close(saved_gradients[name], grad, msg=name)


@pytest.mark.parametrize("with_lora", [False, True])
def test_under_autocast_the_products_are_low_and_the_loss_is_not(make, shuffle, with_lora):
    model, batch = make("llama"), batch_of(9, 6, 11)
    if with_lora:
        add_lora(model, LoRAConfig(rank=4, target_modules=["lm_head"]))
        shuffle(model)
    with torch.autocast("cpu", torch.bfloat16):
        check_equal(model, batch, rtol=2e-2)


def test_a_bf16_model(make):
    check_equal(make("gemma2").bfloat16(), batch_of(9, 6, 11), rtol=2e-2)


def test_positions_that_the_model_adds_are_refused(make):
    from peft import PromptTuningConfig

    model = get_peft_model(make("llama"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))
    with pytest.raises(LLMBuilderError, match="positions of their own"):
        LanguageHead(model).loss_sum(batch_of(9, 6))
