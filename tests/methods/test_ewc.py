"""Elastic weight consolidation: its penalty against the formula, tasks folded against tasks kept apart."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from llmbuilder.errors import ConfigError
from llmbuilder.methods import EWC, Run
from llmbuilder.methods.ewc import BATCH_LOGITS, BATCH_TOKENS, Quadratic, batches_of, fisher_of
from llmbuilder.models import GPT, GPTConfig

Tensors = dict[str, Tensor]
SHAPES = {"matrix": (3, 4), "vector": (5,)}


def draw(positive: bool = False) -> Tensors:
    """fp64; where a Fisher information, some of it zero."""
    values = {name: torch.randn(shape, dtype=torch.float64) for name, shape in SHAPES.items()}
    return {name: value.relu() if positive else value for name, value in values.items()}


def parameters() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(value) for name, value in draw().items()}


def formula(params: dict[str, nn.Parameter], tasks: list[tuple[Tensors, Tensors]], strength: float) -> Tensor:
    """λ/2 Σ_t Σ F_t (θ - θ_t)², as written."""
    terms = [(F[name] * (params[name] - anchor[name]) ** 2).sum() for F, anchor in tasks for name in params]
    return strength / 2 * torch.stack(terms).sum()


def test_continual_learning_folds_tasks_exactly() -> None:
    """Value and gradient of T folded tasks are those of T separate ones, in fp64, anywhere; also where an F is 0."""
    tasks = [(draw(positive=True), draw()) for _ in range(5)]
    folded = Quadratic()
    for fishers, anchors in tasks:
        folded.fold(fishers, anchors)
    for _ in range(3):
        params = parameters()
        wanted = formula(params, tasks, 0.7)
        wanted_gradients = torch.autograd.grad(wanted, list(params.values()))
        value = folded.add_penalty_(params, 0.7)
        assert value == pytest.approx(float(wanted), rel=1e-12)
        for param, gradient in zip(params.values(), wanted_gradients, strict=True):
            assert param.grad is not None and torch.allclose(param.grad, gradient, rtol=1e-11, atol=1e-12)


def test_folding_takes_weights_that_only_some_tasks_know() -> None:
    first, second = (draw(positive=True), draw()), (draw(positive=True), draw())
    folded = Quadratic()
    folded.fold(first[0], first[1])
    folded.fold({"vector": second[0]["vector"]}, second[1])
    params = parameters()
    value = folded.add_penalty_(params, 1.0)
    apart = formula(params, [first], 1.0) + formula({"vector": params["vector"]}, [second], 1.0)
    assert value == pytest.approx(float(apart), rel=1e-12)


def test_penalty_adds_to_the_gradient_of_what_trains_and_to_nothing_else() -> None:
    params = parameters()
    kept = Quadratic()
    kept.fold(draw(positive=True), draw())
    params["matrix"].requires_grad_(False)
    before = torch.randn_like(params["vector"])
    params["vector"].grad = before.clone()
    kept.add_penalty_(params, 2.0)
    moved = 2.0 * kept.fishers["vector"] * (params["vector"] - kept.anchors["vector"])
    assert params["vector"].grad is not None and torch.allclose(params["vector"].grad, before + moved, rtol=1e-12)
    assert params["matrix"].grad is None


def test_fisher_decay_keeps_one_anchor_and_lets_the_past_fade() -> None:
    tasks = [(draw(positive=True), draw()) for _ in range(3)]
    online = Quadratic()
    for fishers, anchors in tasks:
        online.replace(fishers, anchors, 0.5)
    faded = {name: 0.25 * tasks[0][0][name] + 0.5 * tasks[1][0][name] + tasks[2][0][name] for name in SHAPES}
    params = parameters()
    assert online.add_penalty_(params, 1.0) == pytest.approx(float(formula(params, [(faded, tasks[2][1])], 1.0)))


EXAMPLES = [{"input_ids": ids, "labels": ids} for ids in torch.randint(31, (20, 12)).tolist()]
OTHERS = [{"input_ids": ids, "labels": ids} for ids in torch.randint(31, (20, 9)).tolist()]


def gpt() -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return GPT(GPTConfig(vocab_size=31, n_layer=1, n_head=2, n_embd=8, block_size=16)).eval()


def prepared(method: EWC, **run: Any) -> Run:
    made = Run(gpt(), sources={"train": EXAMPLES}, **run)
    method.prepare(made)
    return made


def test_the_first_task_s_past_is_the_base_model() -> None:
    """F of the general data at the weights as they are; a second task takes what the first knew."""
    method = EWC(1.0)
    run = prepared(method, general=OTHERS)
    method.before_task(run)
    params = dict(run.model.named_parameters())
    base = fisher_of(run, params, OTHERS, empirical=False)
    assert all(torch.equal(method.past_tasks.fishers[name], base[name]) for name in base)
    assert all(torch.equal(method.past_tasks.anchors[name], weight) for name, weight in params.items())
    assert method.penalty() == 0.0  # nothing has moved

    with torch.no_grad():
        for weight in params.values():
            weight.add_(0.01)
    method.after_task(run)
    own = fisher_of(run, params, EXAMPLES, empirical=False)
    second = EWC(1.0)
    second.load_past(method.past())
    later = prepared(second, general=OTHERS)
    second.before_task(later)
    for name in params:
        assert torch.allclose(second.past_tasks.fishers[name], base[name] + own[name], rtol=1e-6)
        assert torch.equal(second.past_tasks.anchors[name], method.past_tasks.anchors[name])
    assert second.past_tasks.constant == method.past_tasks.constant > 0


def test_fisher_counts_tokens() -> None:
    """Blocks of twice the length have twice the gradient's square and twice the tokens: F does not grow with them.

    Exactly so where an example is the same one twice in a batch of its own, and each counts for itself.
    """
    run = prepared(EWC(1.0))
    params = dict(run.model.named_parameters())
    once = fisher_of(run, params, EXAMPLES[:4], empirical=True)
    twice = fisher_of(run, params, EXAMPLES[:4] * 2, empirical=True)
    for name, value in once.items():
        assert torch.allclose(twice[name], value, rtol=1e-4, atol=1e-6 * float(value.max()))


def test_weights_that_the_past_does_not_know_are_refused() -> None:
    method = EWC(1.0)
    method.load_past({"constant": 0.0, "fisher/other": torch.ones(2), "anchor/other": torch.ones(2)})
    with pytest.raises(ConfigError, match="train the same"):
        prepared(method)


@pytest.mark.parametrize(
    ("lengths", "vocabulary", "rows"),
    [
        ([10] * 7, 100, [3, 3, 1]),  # as many as may be
        ([1000, 900, 600, 500, 500], 100, [2, 3]),  # as many as the longest leaves room for
        ([BATCH_TOKENS + 1, BATCH_TOKENS, 5, 5], 100, [1, 1, 2]),  # what is too long goes alone
        ([64] * 4, BATCH_LOGITS // 128, [2, 2]),  # a large vocabulary leaves less
    ],
)
def test_fisher_batches_hold_no_more_than_is_good(lengths: list[int], vocabulary: int, rows: list[int]) -> None:
    examples = [{"input_ids": [0] * length, "labels": [at] * length} for at, length in enumerate(lengths)]
    found = list(batches_of(examples, 3, vocabulary))
    assert [len(part) for part in found] == rows
    assert [example for part in found for example in part] == examples


def test_anchors_stay_where_the_weights_were() -> None:
    """Also in fp64, which nothing is rounded to: θ moves by 1, λ/2 Σ F 1² with F = 1 and three weights."""
    weight = nn.Parameter(torch.ones(3, dtype=torch.float64))
    past = Quadratic()
    past.fold({"w": torch.ones(3, dtype=torch.float64)}, {"w": weight})
    with torch.no_grad():
        weight += 1
    assert past.add_penalty_({"w": weight}, 1.0) == pytest.approx(1.5, rel=1e-12)


def test_rows_that_a_table_got_since_are_free_and_other_shapes_are_refused() -> None:
    """F [2,3] around 0, in a table that has three rows now: the third counts nothing and gets no gradient."""
    fisher, old = torch.rand(2, 3), torch.randn(2, 3)
    state = {"constant": 0.0, "fisher/weight": fisher, "anchor/weight": torch.zeros(2, 3)}
    table = nn.Embedding(3, 3)
    with torch.no_grad():
        table.weight[:2] = old
    method = EWC(2.0)
    method.load_state(state)
    method.prepare(Run(table))
    table.weight.grad = torch.zeros(3, 3)
    assert method.penalty() == pytest.approx(float((fisher * old**2).sum()), rel=1e-5)
    assert torch.allclose(table.weight.grad[:2], 2 * fisher * old, rtol=1e-5) and not table.weight.grad[2].any()
    for other in (nn.Embedding(1, 3), nn.Embedding(2, 4)):
        with pytest.raises(ConfigError, match=r"knows .weight. as"):
            method.prepare(Run(other))


def test_ewc_holds_weights_in_bf16_runs_as_in_fp32(make_gpt: Any, make_rows: Any, tune: Any) -> None:
    """The penalty of the same runs, but for bf16's rounding of what it is made of."""
    extra = {}
    for dtype in ("fp32", "bf16"):
        settings = {"continual_learning": True, "regularization_strength": 100.0, "dtype": dtype}
        tuner = tune(make_gpt(), make_rows(16), general_dataset=make_rows(8, 1), **settings)
        extra[dtype] = tuner.results.history[-1]["extra_loss"]
    assert extra["fp32"] > 0 and extra["bf16"] == pytest.approx(extra["fp32"], rel=0.2)
