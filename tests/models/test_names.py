"""The name table: what each name means in each architecture, and what is said when it means nothing."""

import pytest
import torch
import transformers
from torch import nn

from llmbuilder.errors import ConfigError
from llmbuilder.models import GPT, GPTConfig
from llmbuilder.models.names import FAMILIES, feed_forward, part_rows, resolve

SHAPE = {
    "vocab_size": 19,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": None,
}
GPT2_SHAPE = {"vocab_size": 19, "n_embd": 16, "n_layer": 1, "n_head": 4, "bos_token_id": None, "eos_token_id": None}
FALCON_SHAPE = {
    "vocab_size": 19,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "alibi": True,
    "bias": True,
}
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SHAPE),
    "qwen2": lambda: transformers.Qwen2Config(**SHAPE),
    "qwen3": lambda: transformers.Qwen3Config(**SHAPE, head_dim=4),
    "mistral": lambda: transformers.MistralConfig(**SHAPE),
    "gemma": lambda: transformers.GemmaConfig(**SHAPE, head_dim=4),
    "gemma2": lambda: transformers.Gemma2Config(**SHAPE, head_dim=4),
    "gemma3_text": lambda: transformers.Gemma3TextConfig(**SHAPE, head_dim=4),
    "gpt2": lambda: transformers.GPT2Config(**GPT2_SHAPE),
    "gpt_neox": lambda: transformers.GPTNeoXConfig(**{k: v for k, v in SHAPE.items() if "key_value" not in k}),
    "phi": lambda: transformers.PhiConfig(**SHAPE),
    "phi3": lambda: transformers.Phi3Config(**SHAPE),
    "smollm3": lambda: transformers.SmolLM3Config(**SHAPE),
    "granite": lambda: transformers.GraniteConfig(**SHAPE),
    "olmo": lambda: transformers.OlmoConfig(**SHAPE),
    "olmo2": lambda: transformers.Olmo2Config(**SHAPE),
    "olmo3": lambda: transformers.Olmo3Config(**SHAPE),
    "stablelm": lambda: transformers.StableLmConfig(**SHAPE),
    "cohere": lambda: transformers.CohereConfig(**SHAPE),
    "cohere2": lambda: transformers.Cohere2Config(**SHAPE, head_dim=4),
    "helium": lambda: transformers.HeliumConfig(**SHAPE, head_dim=4),
    "exaone4": lambda: transformers.Exaone4Config(**SHAPE),
    "ministral": lambda: transformers.MinistralConfig(**SHAPE, head_dim=4),
    "ernie4_5": lambda: transformers.Ernie4_5Config(**SHAPE, head_dim=4),
    "starcoder2": lambda: transformers.Starcoder2Config(**SHAPE),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        vocab_size=19, hidden_size=16, num_layers=1, num_heads=4, attention_types=[[["global"], 1]]
    ),
    "gptj": lambda: transformers.GPTJConfig(vocab_size=19, n_embd=16, n_layer=1, n_head=4, rotary_dim=4),
    "bloom": lambda: transformers.BloomConfig(vocab_size=19, hidden_size=16, n_layer=1, n_head=4),
    "mpt": lambda: transformers.MptConfig(vocab_size=19, d_model=16, n_layers=1, n_heads=4, no_bias=False),
    "falcon": lambda: transformers.FalconConfig(**FALCON_SHAPE, multi_query=False),
    "falcon, one key": lambda: transformers.FalconConfig(**FALCON_SHAPE, multi_query=True),
    "falcon, two keys": lambda: transformers.FalconConfig(
        **FALCON_SHAPE, new_decoder_architecture=True, num_kv_heads=2
    ),
    "opt": lambda: transformers.OPTConfig(
        vocab_size=19, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=4, word_embed_proj_dim=16
    ),
}

MIXTURES = {
    "mixtral": "MixtralConfig",
    "qwen2_moe": "Qwen2MoeConfig",
    "qwen3_moe": "Qwen3MoeConfig",
    "gpt_oss": "GptOssConfig",
}

Q, K, V = ("attention.query", "attention.key", "attention.value")
LLAMA = {
    Q: ["self_attn.q_proj"],
    K: ["self_attn.k_proj"],
    V: ["self_attn.v_proj"],
    "attention.output": ["self_attn.o_proj"],
    "mlp.dense": ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"],
}
# For each name the layers that it means, as "layer" or "layer:part", written down from the modules' sources.
EXPECTED = {
    **dict.fromkeys(
        [
            *(
                "llama",
                "qwen2",
                "qwen3",
                "mistral",
                "ministral",
                "gemma",
                "gemma2",
                "gemma3_text",
                "smollm3",
                "granite",
            ),
            *("olmo", "olmo2", "olmo3", "stablelm", "cohere", "cohere2", "helium", "exaone4", "ernie4_5"),
        ],
        ("model.layers.0", LLAMA),
    ),
    "starcoder2": ("model.layers.0", {**LLAMA, "mlp.dense": ["mlp.c_fc", "mlp.c_proj"]}),
    "opt": (
        "model.decoder.layers.0",
        {**LLAMA, "attention.output": ["self_attn.out_proj"], "mlp.dense": ["fc1", "fc2"]},
    ),
    "gpt2": (
        "transformer.h.0",
        {
            Q: ["attn.c_attn:query"],
            K: ["attn.c_attn:key"],
            V: ["attn.c_attn:value"],
            "attention.output": ["attn.c_proj"],
            "mlp.dense": ["mlp.c_fc", "mlp.c_proj"],
        },
    ),
    "gpt_neox": (
        "gpt_neox.layers.0",
        {
            Q: ["attention.query_key_value:query"],
            K: ["attention.query_key_value:key"],
            V: ["attention.query_key_value:value"],
            "attention.output": ["attention.dense"],
            "mlp.dense": ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
        },
    ),
    "gpt_neo": (
        "transformer.h.0",
        {
            Q: ["attn.attention.q_proj"],
            K: ["attn.attention.k_proj"],
            V: ["attn.attention.v_proj"],
            "attention.output": ["attn.attention.out_proj"],
            "mlp.dense": ["mlp.c_fc", "mlp.c_proj"],
        },
    ),
    "gptj": (
        "transformer.h.0",
        {
            Q: ["attn.q_proj"],
            K: ["attn.k_proj"],
            V: ["attn.v_proj"],
            "attention.output": ["attn.out_proj"],
            "mlp.dense": ["mlp.fc_in", "mlp.fc_out"],
        },
    ),
    **dict.fromkeys(
        ["bloom", "falcon"],
        (
            "transformer.h.0",
            {
                Q: ["self_attention.query_key_value:query"],
                K: ["self_attention.query_key_value:key"],
                V: ["self_attention.query_key_value:value"],
                "attention.output": ["self_attention.dense"],
                "mlp.dense": ["mlp.dense_h_to_4h", "mlp.dense_4h_to_h"],
            },
        ),
    ),
    "mpt": (
        "transformer.blocks.0",
        {
            Q: ["attn.Wqkv:query"],
            K: ["attn.Wqkv:key"],
            V: ["attn.Wqkv:value"],
            "attention.output": ["attn.out_proj"],
            "mlp.dense": ["ffn.up_proj", "ffn.down_proj"],
        },
    ),
    "phi": ("model.layers.0", {**LLAMA, "attention.output": ["self_attn.dense"], "mlp.dense": ["mlp.fc1", "mlp.fc2"]}),
    "phi3": (
        "model.layers.0",
        {
            Q: ["self_attn.qkv_proj:query"],
            K: ["self_attn.qkv_proj:key"],
            V: ["self_attn.qkv_proj:value"],
            "attention.output": ["self_attn.o_proj"],
            "mlp.dense": ["mlp.gate_up_proj:gate", "mlp.gate_up_proj:up", "mlp.down_proj"],
        },
    ),
    "native": (
        "blocks.0",
        {
            Q: ["attention.query"],
            K: ["attention.key"],
            V: ["attention.value"],
            "attention.output": ["attention.output"],
            "mlp.dense": ["mlp.gate", "mlp.up", "mlp.down"],
        },
    ),
}


def build(name: str) -> nn.Module:
    if name == "native":
        return GPT(GPTConfig(vocab_size=19, n_layer=1, n_head=4, n_embd=16, block_size=8))
    return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]())


def flat(model: nn.Module, names: list[str] | str) -> set[str]:
    """What ``names`` resolve to, as "path" or "path:part"."""
    targets = resolve(model, names)
    assert all(model.get_submodule(target.path) is target.module for target in targets)
    return {f"{t.path}:{part}" if part else t.path for t in targets for part in (t.parts or [""])}


def test_every_family_of_the_table_is_tested() -> None:
    assert {*EXPECTED, *MIXTURES} == {*FAMILIES, "native"}


@pytest.mark.parametrize("name", MIXTURES)
def test_of_a_mixture_the_attention_has_names_and_the_feed_forward_part_is_a_whole(name: str) -> None:
    model = transformers.AutoModelForCausalLM.from_config(getattr(transformers, MIXTURES[name])(**SHAPE, head_dim=4))
    attention = {guide: layers for guide, layers in LLAMA.items() if guide != "mlp.dense"}
    for guide, layers in attention.items():
        assert flat(model, [guide]) == {f"model.layers.0.{layer}" for layer in layers}
    assert flat(model, "attention") == {f"model.layers.0.{layer}" for (layer,) in attention.values()}
    assert [target.path for target in feed_forward(model)] == ["model.layers.0.mlp"]
    with pytest.raises(ConfigError, match=r"'mpl' matches no layer .* It has: attention, attention.query, "):
        resolve(model, ["mpl"])


def test_feed_forward_layers_are_linear_ones_where_they_are_known_and_must_be_there() -> None:
    assert [target.path for target in feed_forward(build("opt"))] == [
        f"model.decoder.layers.0.{layer}" for layer in ("fc1", "fc2")
    ]
    mamba = transformers.MambaForCausalLM(
        transformers.MambaConfig(vocab_size=19, hidden_size=16, num_hidden_layers=1, state_size=4)
    )
    with pytest.raises(ConfigError, match="the feed-forward layers of MambaForCausalLM are not known by name"):
        feed_forward(mamba)


@pytest.mark.parametrize("name", EXPECTED)
def test_each_name_and_group_means_the_layers_of_the_family(name: str) -> None:
    model, (block, table) = build(name), EXPECTED[name]
    for guide, layers in table.items():
        assert flat(model, [guide]) == {f"{block}.{layer}" for layer in layers}
    attention = {f"{block}.{layer}" for guide, layers in table.items() if guide != "mlp.dense" for layer in layers}
    assert flat(model, "attention") == attention
    assert flat(model, "mlp") == flat(model, ["mlp.dense"])
    assert flat(model, ["attention", "mlp.dense"]) == attention | flat(model, "mlp")


@pytest.mark.parametrize("name", EXPECTED)
def test_all_is_every_linear_layer_but_the_head(name: str) -> None:
    model = build(name)
    kinds = (nn.Linear, transformers.pytorch_utils.Conv1D)
    linear = {path for path, module in model.named_modules() if isinstance(module, kinds)}
    head = {path for path, module in model.named_modules() if module is model.get_output_embeddings()}
    assert flat(model, "all") == flat(model, ["all-linear"]) == linear - head
    assert head


@pytest.mark.parametrize("name", EXPECTED)
def test_embeddings_is_the_table_of_tokens(name: str) -> None:
    model = build(name)
    (target,) = resolve(model, "embeddings")
    assert target.module is model.get_input_embeddings()


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "phi3"])
def test_the_parts_of_a_fused_layer_are_what_the_model_uses_as_them(name: str) -> None:
    """Doubling a part's rows of weight and bias scales what reaches attention (or the activation) as that part."""
    torch.manual_seed(0)
    model = build(name).eval()
    fused = {t.path: t.module for t in resolve(model, ["attention.query", "mlp.dense"]) if t.parts}
    for path, layer in fused.items():
        rows = part_rows(model, path)
        assert torch.equal(
            torch.cat(list(rows.values())).sort().values, torch.arange(len(torch.cat(list(rows.values()))))
        )
        for part in rows:
            with torch.no_grad():
                before = used(model, path)
                for parameter in layer.parameters(recurse=False):
                    conv = isinstance(layer, transformers.pytorch_utils.Conv1D) and parameter.dim() == 2
                    (parameter.t() if conv else parameter)[rows[part]] *= 2
                after = used(model, path)
            for other in rows:
                scale = 2 if other == part else 1
                torch.testing.assert_close(after[other], scale * before[other], msg=f"{path} {part} {other}")


def used(model: nn.Module, path: str) -> dict[str, torch.Tensor]:
    """What the model makes of a fused layer's output: query, key and value as attention gets them (sizes, since
    rotation keeps them), or gate and up."""
    if path.endswith("gate_up_proj"):
        mlp, x = model.get_submodule(path.rpartition(".")[0]), torch.ones(1, 16)
        seen: dict[str, torch.Tensor] = {}
        activation = mlp.activation_fn
        mlp.activation_fn = nn.Identity()
        mlp.activation_fn.register_forward_hook(lambda _, inputs, __: seen.update(gate=inputs[0]))
        down = mlp.down_proj.register_forward_pre_hook(lambda _, inputs: seen.update(product=inputs[0]))
        mlp(x)
        down.remove()
        mlp.activation_fn = activation
        return {"gate": seen["gate"], "up": seen["product"] / seen["gate"]}
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    seen = {}

    def spy(module, query, key, value, *args, **kwargs):  # type: ignore[no-untyped-def]
        seen.update(query=query.norm(dim=-1), key=key.norm(dim=-1), value=value.norm(dim=-1))
        return query.transpose(1, 2).contiguous(), None

    ALL_ATTENTION_FUNCTIONS.register("spy", spy)
    before, model.config._attn_implementation = model.config._attn_implementation, "spy"
    model(torch.arange(5)[None])
    model.config._attn_implementation = before
    return seen


@pytest.mark.parametrize("name", ["bloom", "mpt", "falcon", "falcon, one key", "falcon, two keys"])
def test_the_parts_of_a_fused_layer_act_as_query_key_and_value(name: str) -> None:
    """Attention without rotation is linear in the values, does not tell a larger query from a larger key, and looks for
    what differs between keys: a constant that all of them have changes nothing, one of the queries does."""
    torch.manual_seed(0)
    model = build(name).eval()
    (output,) = resolve(model, ["attention.output"])
    fused = resolve(model, ["attention.query"])[0]
    rows = part_rows(model, fused.path)
    assert torch.equal(torch.cat(list(rows.values())).sort().values, torch.arange(len(fused.module.weight)))
    before = changed(model, fused.module, output.module, {})
    double = changed(model, fused.module, output.module, {"value": (rows["value"], 2.0, 0.0)})
    torch.testing.assert_close(double, 2 * before)
    scaled = {"query": (rows["query"], 4.0, 0.0), "key": (rows["key"], 0.25, 0.0)}
    torch.testing.assert_close(changed(model, fused.module, output.module, scaled), before)
    constant = {part: changed(model, fused.module, output.module, {part: (rows[part], 1.0, 3.0)}) for part in rows}
    torch.testing.assert_close(constant["key"], before)
    assert not torch.allclose(constant["query"], before, atol=1e-3)


@torch.no_grad()
def changed(
    model: nn.Module, fused: nn.Module, output: nn.Module, changes: dict[str, tuple[torch.Tensor, float, float]]
) -> torch.Tensor:
    """What the output layer reads when rows of the fused layer are multiplied, and a constant is added to them."""
    seen = []
    hooks = [output.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].clone()))]

    def change(_: nn.Module, __: object, y: torch.Tensor) -> torch.Tensor:
        for rows, factor, constant in changes.values():
            y = y.index_copy(-1, rows, factor * y[..., rows] + constant)
        return y

    hooks.append(fused.register_forward_hook(change))
    model(torch.arange(5)[None])
    for hook in hooks:
        hook.remove()
    return seen[0]


def test_the_whole_layer_by_its_own_name_swallows_its_parts() -> None:
    model = build("gpt2")
    assert flat(model, ["attention.query", "c_attn"]) == {"transformer.h.0.attn.c_attn"}


def test_an_own_name_is_the_end_of_the_path_at_a_dot() -> None:
    model = build("llama")
    assert flat(model, ["q_proj"]) == flat(model, ["layers.0.self_attn.q_proj"]) == {"model.layers.0.self_attn.q_proj"}
    assert flat(model, ["lm_head"]) == {"lm_head"}
    with pytest.raises(ConfigError, match="'_proj' matches no layer"):
        resolve(model, ["_proj"])


def test_any_architecture_has_its_own_names_and_all() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 5))
    assert flat(model, "all") == {"0", "2"}
    assert flat(model, ["2"]) == {"2"}
    with pytest.raises(ConfigError, match=r"'attention' matches no layer of Sequential.* by their own names: 0, 2"):
        resolve(model, "attention")


def test_a_shared_layer_is_one_target() -> None:
    layer = nn.Linear(3, 3)
    model = nn.ModuleDict({"first": layer, "second": layer, "third": nn.Linear(3, 3)})
    assert flat(model, ["second", "first"]) == {"first"}
    assert flat(model, "all") == {"first", "third"}


def test_what_is_excluded_is_left_out_with_all_it_holds() -> None:
    model = build("llama")
    targets = resolve(model, "all", exclude=["model.layers.0.mlp", "model.layers.0.self_attn.k_proj"])
    assert {target.path.rpartition(".")[2] for target in targets} == {"q_proj", "v_proj", "o_proj"}
    with pytest.raises(ConfigError, match=r"names nothing outside model.layers.0.mlp"):
        resolve(model, "mlp", exclude=["model.layers.0.mlp"])


def test_a_name_that_matches_nothing_is_answered_with_the_nearest_and_with_what_there_is() -> None:
    with pytest.raises(ConfigError) as error:
        resolve(build("llama"), ["attention.querry"])
    said = str(error.value)
    assert "'attention.querry' matches no layer of LlamaForCausalLM; did you mean 'attention.query'?" in said
    assert all(name in said for name in ("attention", "mlp.dense", "embeddings", "all", "down_proj", "lm_head"))


def test_a_layer_of_another_kind_is_refused_by_its_kind() -> None:
    with pytest.raises(ConfigError, match="'input_layernorm' is a LlamaRMSNorm; adapters fit linear layers"):
        resolve(build("llama"), ["input_layernorm"])


@pytest.mark.parametrize("names", [["0"], "all"])
def test_a_quantised_layer_is_refused(names: list[str] | str) -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    model[0].weight = nn.Parameter(torch.zeros(4, 3, dtype=torch.int8), requires_grad=False)
    with pytest.raises(ConfigError, match="the weight of '0' is quantised"):
        resolve(model, names)


def test_the_uncalled_projection_of_torchs_attention_is_no_target() -> None:
    """nn.MultiheadAttention reads its out_proj's weight and never calls it: an adapter there would do nothing."""
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "dense": nn.Linear(4, 4)})
    assert flat(model, "all") == {"dense"}


def test_grouped_attention_has_fewer_rows_of_key_and_value() -> None:
    model = build("phi3")
    rows = part_rows(model, "model.layers.0.self_attn.qkv_proj")
    assert [len(rows[part]) for part in ("query", "key", "value")] == [16, 8, 8]
    assert part_rows(model, "model.layers.0.self_attn.o_proj") == {}


def test_a_layer_whose_weight_is_used_without_calling_it_is_left_out_and_refused_by_name():
    shape = {"vocab_size": 19, "hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    model = transformers.AutoModelForCausalLM.from_config(transformers.MambaConfig(**shape))
    leaves = {target.path.rpartition(".")[2] for target in resolve(model, "all")}
    assert leaves == {"in_proj", "x_proj", "out_proj"}
    with pytest.raises(ConfigError, match="dt_proj' is never called"):
        resolve(model, "dt_proj")


def test_a_router_that_returns_its_choice_of_experts_is_no_linear_layer():
    experts = {"num_local_experts": 2, "intermediate_size_mlp": 24, "head_dim": 4}
    model = transformers.AutoModelForCausalLM.from_config(transformers.Llama4TextConfig(**SHAPE, **experts))
    paths = [target.path for target in resolve(model, "all")]
    assert any(name.endswith("router") for name, _ in model.named_modules())
    assert any(path.endswith("q_proj") for path in paths)
    assert not any(path.endswith("router") for path in paths)
