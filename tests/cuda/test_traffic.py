"""What a LoRA layer's passes move in all: the counts that docs/kernels.md tells. Single operators: their own tests."""

import pytest
import torch
from traffic import layer, table


@pytest.mark.parametrize(("rank", "exposed"), [(8, 5), (32, 5), (40, 6), (200, 6)])
def test_the_library_path_exposes_five_passes_and_six_above_rank_32(cuda, rank, exposed):
    moved = layer.ours(cuda, rank)
    assert moved.exposed == exposed
    assert moved.products == 6  # each reads one matrix and adds into another
    passes = {name: units for name, units in moved.kernels.items() if units}
    assert passes.pop("shrink_kernel") == 1 and passes.pop("expand_kernel") == 1
    assert passes.pop("grad_ax_kernel") == 2 and list(passes.values()) == [exposed - 4]


def test_without_dropout_it_is_the_same(cuda):
    assert layer.ours(cuda, 16, threshold=0).kernels == layer.ours(cuda, 16).kernels


def test_the_fused_path_moves_seven_passes_in_all(cuda):
    moved = layer.ours(cuda, 16, fused=True)
    assert moved.total == 7 and moved.products == 0
    assert moved.total - layer.frozen().total == 3


def test_peft_moves_twenty_five_passes():
    moved = layer.peft(16)
    assert moved.total == 25 and layer.frozen().total == 4


def test_what_else_moves_grows_with_the_rank_alone(cuda):
    """S, dS, A, B, dA, dB and the partial sums."""
    of_rank = [layer.ours(cuda, rank).small / rank for rank in (8, 16, 32)]
    assert max(of_rank) < 1.1 * min(of_rank)


def test_the_page_tells_what_is_counted(emulator):
    assert table.BEGIN in (text := table.PAGE.read_text())
    assert text.split(table.BEGIN)[1].split(table.END)[0].strip() == table.table(emulator)


def test_the_counter_of_eager_operators_sees_what_torch_moves():
    from traffic.eager import EagerTraffic

    x, y = torch.randn(3, 5), torch.randn(3, 5)
    with EagerTraffic() as moved:
        torch.ops.aten._unsafe_view((x + y).mul_(2).view(15), [5, 3]).detach()
    assert moved.operators == ["add.Tensor", "mul_.Tensor"]
    assert moved.moved == {(3, 5): 60 * (3 + 2)}
