"""How the Triton kernels are launched and tuned: what needs neither a GPU nor the interpreter."""

import math

import pytest
import torch

pytest.importorskip("triton")
from llmbuilder.errors import LLMBuilderError
from llmbuilder.kernels import launch, lora_expand, lora_fused, lora_grad_ax, lora_grad_sb, lora_shrink
from llmbuilder.kernels.tiles import inner, padded

TUNED = [
    lora_shrink.shrink_kernel,
    lora_expand.expand_kernel,
    lora_grad_ax.grad_ax_kernel,
    lora_grad_sb.grad_sb_kernel,
    lora_fused.fused_kernel,
]


@pytest.mark.parametrize("kernel", TUNED, ids=lambda kernel: kernel.fn.__name__)
@pytest.mark.parametrize("precision", ["tf32", "ieee"])
def test_some_tile_fits_whatever_the_rank(kernel, precision):
    kernel.nargs = {}
    for rank in (16, 32, 64, 128, 256):
        if kernel is lora_grad_sb.grad_sb_kernel and (precision == "ieee" or rank > lora_grad_sb.ONE_PASS_RANK):
            continue  # takes two passes by other kernels
        fit = kernel.prune_configs({"RANK": rank, "PRECISION": precision})
        assert 1 <= len(fit) <= len(kernel.configs) <= 6, f"rank {rank}"


@pytest.mark.parametrize("precision, largest", [("tf32", 512), ("ieee", 256)])
def test_ranks_that_no_tile_holds_are_refused_in_words(precision, largest):
    kernel = lora_shrink.shrink_kernel
    kernel.nargs = {}
    assert kernel.prune_configs({"RANK": largest, "PRECISION": precision})
    with pytest.raises(LLMBuilderError, match=f"padded to {2 * largest}; LLMBUILDER_BACKEND=cuda or reference"):
        kernel.prune_configs({"RANK": 2 * largest, "PRECISION": precision})


@pytest.mark.parametrize("kernel", TUNED, ids=lambda kernel: kernel.fn.__name__)
def test_products_by_fma_get_a_tile_that_fits_them(kernel, monkeypatch):
    """Also after the same shape on tensor cores, for which a larger tile was the fastest."""
    if kernel is lora_grad_sb.grad_sb_kernel:
        pytest.skip("fp32 takes two passes by other kernels")
    monkeypatch.setattr(kernel, "cache", {})
    monkeypatch.setattr(kernel, "cache_results", False)
    monkeypatch.setattr(kernel, "_bench", lambda *_, config, **meta: -math.prod(config.kwargs.values()))
    monkeypatch.setattr(kernel.fn, "run", lambda *arguments, **meta: None)
    shape = dict.fromkeys(kernel.keys, 64) | {"RANK": 128}
    for precision in ("tf32", "ieee"):
        kernel.run(**shape | {"PRECISION": precision})
        chosen = kernel.best_config
        kernel.nargs = {}
        assert chosen in kernel.prune_configs(shape | {"PRECISION": precision})


def test_no_tuning_inside_the_capture_of_a_graph(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    kernel = lora_shrink.shrink_kernel
    kernel.nargs = {}
    with pytest.raises(LLMBuilderError, match="run the same step once before the capture"):
        kernel.prune_configs({"RANK": 16, "PRECISION": "tf32"})


def test_results_of_tuning_are_kept_on_disk():
    assert all(kernel.cache_results for kernel in TUNED)


def test_configs_do_not_touch_the_order_of_sums():
    """Neither the extent of a part, nor the step of an inner dimension, is tuned."""
    assert {name for kernel in TUNED for config in kernel.configs for name in config.kwargs} == {"ROWS", "COLUMNS"}
    assert all("COLUMNS" not in config.kwargs for config in lora_grad_sb.grad_sb_kernel.configs)


def test_no_program_is_no_launch():
    launch.launch(None, 0, torch.ones(1))


def test_tuning_goes_by_classes_of_rows():
    assert [launch.size_class(rows) for rows in (0, 1, 3, 4096, 4097)] == [1, 1, 4, 4096, 8192]


def test_ranks_are_padded_for_tensor_cores():
    assert [padded(rank) for rank in (1, 16, 17, 100, 256)] == [16, 16, 32, 128, 256]


def test_precision_follows_torchs_setting():
    before = torch.backends.cuda.matmul.fp32_precision
    try:
        for setting, answer, step in (("ieee", "ieee", 16), ("tf32", "tf32", 64)):
            torch.backends.cuda.matmul.fp32_precision = setting
            assert launch.precision(torch.float32) == answer and inner(16, torch.float32) == step
            assert launch.precision(torch.bfloat16) == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
