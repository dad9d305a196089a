"""Threads and dynamic shared memory of every CUDA kernel, from its own launcher: each is called in every variant."""

import functools
from itertools import product

import torch
from gpusim.record import Launch, Recorder, build
from ptx.operators import CALLS, Case, draw

from llmbuilder.ops import _backend, _cuda

RANKS = (8, 24, 40, 100, 200)  # one for each tile
TYPES = ((torch.bfloat16, False), (torch.float16, False), (torch.float32, False), (torch.float32, True))


@functools.cache
def launches() -> dict[str, Launch]:
    """By the kernel's symbol; of several launches of one kernel that with the most shared memory."""
    found: dict[str, Launch] = {}
    recorder = Recorder(build())
    with _backend.emulated(recorder.module):
        for operator, (dtype, tf32), rank, sliced in product(CALLS, TYPES, RANKS, (False, True)):
            case = Case(operator, dtype, 64, 64, 64, rank, threshold=6554, sliced=sliced, tf32=tf32)
            before, _cuda.allows_tf32 = _cuda.allows_tf32, lambda tf32=tf32: tf32
            try:
                draw(case).call(_cuda)
            finally:
                _cuda.allows_tf32 = before
        for dtype in _cuda.DTYPES:
            draw(Case("lora_shrink", dtype, 16, 1, 8192, 8)).call(_cuda)  # few rows: the depth in slices
            _others(dtype)
    for launch in recorder.launches():
        if launch.symbol not in found or launch.shared > found[launch.symbol].shared:
            found[launch.symbol] = launch
    return found


def _others(dtype: torch.dtype) -> None:
    """Those that take lists or logits, on memory that is aligned and on memory that is not."""
    seed = torch.tensor(1)
    for offset in (0, 1):
        parameters = [torch.zeros(65, dtype=dtype)[offset:] for _ in range(3)]
        for parameter in parameters:
            parameter.grad = torch.zeros(65, dtype=dtype)[offset:]
        for fishers in (parameters, None):
            _cuda.ewc_penalty_(parameters, parameters, fishers, 1.0)
        _cuda.ewc_accumulate_(parameters, parameters, 1.0)
        for need_grad in (False, True):
            logits = torch.zeros(2, 64 + 2 * offset, dtype=dtype)[:, offset : 64 + offset]
            _cuda.softmax_cross_entropy_(logits, torch.tensor([0, 1]), None, 0.0, need_grad)
        _cuda.dropout(torch.zeros(2, 64 + offset, dtype=dtype), 6554, seed, 0)
    _cuda.dropout_mask((3, 5), 6554, seed, 0)
