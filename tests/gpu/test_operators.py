"""The operators on a real GPU: what the emulator and the interpreter show without one."""

import pytest
import torch
from gpu.place import DEVICE, DRY
from gpusim.record import KERNELS
from torch.nn import functional as F

from llmbuilder import doctor, ops
from llmbuilder.ops import _backend, reference

NARROW = [torch.float32, torch.bfloat16, torch.float16]


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, device=DEVICE).to(dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("shape", [(1,), (33, 63), (7, 5, 128), (0, 8), *([] if DRY else [(4099, 1024), (3, 100_003)])])
def test_dropout_has_the_references_bits(backend, dtype, shape):
    x, seed = normal(*shape, dtype=dtype), torch.tensor(-77, device=DEVICE)
    y = ops.dropout(x, 0.1, seed, 2**32 - 1)
    assert torch.equal(y.cpu(), reference.dropout(x.cpu(), 6554, seed.cpu(), 2**32 - 1))


@pytest.mark.parametrize("dtype", NARROW)
def test_every_operator_is_right_by_the_doctors_rule(backend, dtype):
    wrong = {
        row.operator: doctor._wrong(row.operator, DEVICE.type, dtype) for row in _backend.explain(DEVICE.type, dtype)
    }
    assert wrong.keys() == {name for name, row in _backend.OPERATORS.items() if backend in row}
    assert not any(wrong.values()), wrong


def test_the_doctors_rule_goes_through_every_operators_launcher(backend, launched):
    for row in _backend.explain(DEVICE.type, torch.float32):
        doctor._wrong(row.operator, DEVICE.type, torch.float32)
    assert all(launched.values()) and KERNELS.keys() - launched.keys() == {
        "dropout_mask"
    }  # which is no operator of a backend


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize(
    "M, K, N, r", [(300, 512, 384, 16), (77, 63, 45, 5), (128, 256, 256, 100), (64, 1024, 64, 200)]
)
@pytest.mark.parametrize("p", [0.0, 0.1])
def test_a_lora_layer_errs_no_more_than_torchs(backend, check_error, dtype, M, K, N, r, p):
    ways = [[], [], []]
    for _ in range(4 if DRY else 8):
        x, weight, bias, dY = (normal(*s, dtype=dtype) for s in ((M, K), (N, K), (N,), (M, N)))
        weight = weight / K**0.5
        A, B, seed = normal(r, K) / K**0.5, normal(N, r) / r**0.5, torch.randint(2**62, (), device=DEVICE)
        keep = reference.keep_mask(x.shape, int(65536 * p + 0.5), seed, 0)

        def ours(x, weight, bias, A, B, seed=seed):
            return ops.lora_linear(x, weight, bias, A, B, 1.5, p, seed)

        def plain(x, weight, bias, A, B, keep=keep):
            dropped = torch.where(keep, x * (65536 / (65536 - int(65536 * p + 0.5))), 0)
            return F.linear(x, weight, bias) + 1.5 * dropped @ A.to(x.dtype).t() @ B.to(x.dtype).t()

        wide = [t.double() for t in (x, weight, bias, A.to(dtype), B.to(dtype))]
        for way, function, inputs in (
            (0, ours, (x, weight, bias, A, B)),
            (1, plain, (x, weight, bias, A, B)),
            (2, plain, wide),
        ):
            leaves = [t.detach().clone().requires_grad_() for t in (inputs[0], *inputs[3:])]
            y = function(leaves[0], *inputs[1:3], *leaves[1:])
            ways[way].append([y.detach(), *torch.autograd.grad(y, leaves, dY.to(y.dtype))])
    for i, name in enumerate(("y", "dX", "dA", "dB")):
        check_error(*([draw[i] for draw in way] for way in ways), name, dtype)


def test_the_same_call_gives_the_same_bits(backend):
    x, A, B, seed = normal(500, 512), normal(16, 512), normal(256, 16), torch.tensor(5, device=DEVICE)

    def results():
        leaves = [t.detach().requires_grad_() for t in (x, A, B)]
        y = ops.lora_delta(*leaves, 1.5, 0.1, seed)
        return [y, *torch.autograd.grad(y.sum(), leaves)]

    first = results()
    for _ in range(5):
        assert all(map(torch.equal, results(), first))


def test_ewc_over_a_thousand_tensors(backend):
    params = [normal(1 + i % 70, 33) for i in range(1000)]
    anchors, fishers = [normal(*p.shape) for p in params], [normal(*p.shape).square() for p in params]
    value = ops.ewc_penalty_(params, anchors, fishers, 0.5)
    exact = sum((f.double() * (p.double() - a) ** 2).sum() for p, a, f in zip(params, anchors, fishers, strict=True))
    torch.testing.assert_close(value, 0.25 * exact, rtol=1e-6, atol=0)
    for p, a, f in zip(params, anchors, fishers, strict=True):
        torch.testing.assert_close(p.grad, 0.5 * f * (p - a))


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("V", [7, 1000, *([] if DRY else [32000, 128_257])])
def test_cross_entropy_errs_no_more_than_torchs(backend, check_error, dtype, V):
    ways = [[], [], []]
    for _ in range(4):
        x, weight, targets = normal(40, 64, dtype=dtype), normal(V, 64, dtype=dtype), torch.randint(V, (40,)).to(DEVICE)

        def plain(x, weight, targets=targets):
            return F.cross_entropy((x @ weight.t()).to(torch.promote_types(x.dtype, torch.float32)), targets)

        def ours(x, weight, targets=targets):
            return ops.linear_cross_entropy(x, weight, targets)

        for way, function, inputs in (
            (0, ours, (x, weight)),
            (1, plain, (x, weight)),
            (2, plain, (x.double(), weight.double())),
        ):
            leaves = [t.detach().requires_grad_() for t in inputs]
            loss = function(*leaves)
            ways[way].append([loss.detach(), *torch.autograd.grad(loss, leaves)])
    for i, name in enumerate(("loss", "dx", "dweight")):
        check_error(*([draw[i] for draw in way] for way in ways), name, dtype)


def test_work_goes_to_torchs_current_stream_and_device(needs_streams, backend):
    """A kernel on another stream would read x before the sleep in front of it has let x be written."""
    stream = torch.cuda.Stream()
    x, seed = torch.zeros(1000, 1000, device=DEVICE), torch.tensor(5, device=DEVICE)
    ops.dropout(x, 0.1, seed)  # loaded and tuned
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        x.fill_(1)
        y = ops.dropout(x, 0.1, seed)
    stream.synchronize()
    assert torch.equal(y.cpu(), reference.dropout(torch.ones(1000, 1000), 6554, seed.cpu(), 0))


def test_captured_in_a_cuda_graph_and_replayed(backend, captured):
    """Forward, backward and EWC allocate nothing outside the graph's memory, copy nothing and wait for nothing."""
    x, weight, bias = normal(64, 128), normal(96, 128), normal(96)
    A, B, seed = normal(8, 128).requires_grad_(), normal(96, 8).requires_grad_(), torch.tensor(5, device=DEVICE)
    anchors = [t.detach() + 1 for t in (A, B)]
    A.grad, B.grad = torch.zeros_like(A), torch.zeros_like(B)

    def step():
        A.grad.zero_(), B.grad.zero_()
        y = ops.lora_linear(x, weight, bias, A, B, 1.5, 0.1, seed)
        y.square().sum().backward()
        return ops.ewc_penalty_([A, B], anchors, None, 0.5), y.detach()

    (value, y), replay = captured(step)
    x.copy_(normal(64, 128))
    replay()
    found = [t.clone() for t in (value, y, A.grad, B.grad)]
    expected_value, expected_y = step()
    for a, b in zip(found, (expected_value, expected_y, A.grad, B.grad), strict=True):
        assert torch.equal(a, b)


def test_a_step_launches_each_kernel_once(backend, launched):
    x, weight, (a, b) = normal(64, 128), normal(96, 128), (normal(8, 128), normal(96, 8))
    leaves = [t.requires_grad_() for t in (x, a, b)]
    torch.autograd.grad(ops.lora_linear(x, weight, None, a, b, 1.5, 0.1, torch.tensor(5)).sum(), leaves)
    assert launched == {"lora_shrink": 1, "lora_expand": 1, "lora_grad_sb": 2, "lora_grad_ax": 2}
    launched.clear()
    ops.ewc_penalty_([a, b], [a.detach(), b.detach()], None, 0.5)
    ops.dropout(x.detach(), 0.1)
    assert launched == {"ewc_penalty": 2, "dropout": 1}


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_another_gpu_than_the_current_one(backend):
    x, seed = torch.ones(100, 64, device="cuda:1"), torch.tensor(5, device="cuda:1")
    y = ops.dropout(x, 0.1, seed)
    assert torch.equal(y.cpu(), reference.dropout(x.cpu(), 6554, seed.cpu(), 0))
    assert torch.cuda.current_device() == 0
