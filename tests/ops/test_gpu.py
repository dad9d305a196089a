"""Tables of the places of tensors on a GPU, of both backends: when they are written, how long they are kept."""

import gc
import weakref
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from llmbuilder import _gpu
from llmbuilder.errors import LLMBuilderError
from llmbuilder.ops import _cuda


class Memory:
    """Stands for a table."""


@pytest.fixture
def written():
    return []


@pytest.fixture
def tables(written):
    def write(first, sizes, addresses):
        written.append((sizes, addresses))
        return Memory()

    return _gpu.Tables(write)


def vectors(*sizes):
    return [torch.zeros(size) for size in sizes]


def test_a_table_is_written_once_for_tensors_in_the_same_places(tables, written):
    fishers, grads = vectors(4, 5), vectors(4, 5)
    first = tables.of(fishers, grads)
    assert tables.of(fishers, grads) is first
    assert written == [((4, 5), tuple(tuple(t.data_ptr() for t in group) for group in (fishers, grads)))]
    assert tables.of(fishers, vectors(4, 5)) is not first
    assert tables.of([t.view(torch.int32) for t in fishers], [t.view(torch.int32) for t in grads]) is not first


def test_the_latest_are_kept(tables, written):
    groups = [vectors(3) for _ in range(_gpu.Tables.LATEST + 1)]
    first, *others = [weakref.ref(tables.of(group)) for group in groups]
    gc.collect()
    assert first() is None and all(table() is not None for table in others)
    tables.of(groups[0])
    assert len(written) == len(groups) + 1


def test_a_stream_has_tables_of_its_own(tables, written, monkeypatch):
    """The memory of one that is dropped may be handed on to work that comes later on the stream that wrote it."""
    group = vectors(3)
    for stream in (11, 22, 11):
        monkeypatch.setattr(_gpu, "_stream", lambda tensor, stream=stream: stream)
        tables.of(group)
    assert len(written) == 2


def of_cuda(monkeypatch):
    def table(host, *addresses_and_sizes):
        return 1

    names = {"DType": SimpleNamespace(f32=0), "ewc_table_bytes": lambda count: count, "ewc_table": table}
    kernels = SimpleNamespace(**names, ewc_accumulate=lambda *arguments: None)
    return _cuda, lambda: _cuda.replaced(kernels)


def of_triton(monkeypatch):
    pytest.importorskip("triton")
    from llmbuilder.kernels import ewc

    monkeypatch.setattr(ewc, "launch", lambda *arguments, **meta: None)
    return ewc, nullcontext


@pytest.mark.parametrize("backend", [of_cuda, of_triton])
def test_a_graph_keeps_the_tables_that_it_reads_and_writes_none(monkeypatch, backend):
    """At a replay the kernel would write to wherever another's bytes in a dropped table's place point."""
    module, serving = backend(monkeypatch)
    tables = []

    def write(*places):
        table = module._written_table(*places)
        tables.append(weakref.ref(table[0]))
        return table

    monkeypatch.setattr(module, "_tables", _gpu.Tables(write))
    groups = [(vectors(4), vectors(4)) for _ in range(_gpu.Tables.LATEST + 2)]
    with serving():
        for group in groups[:2]:
            module.ewc_accumulate_(*group, 1.0)
        with monkeypatch.context() as capture:
            capture.setattr(_gpu, "_capturing", lambda tensor: True)
            module.ewc_accumulate_(*groups[0], 1.0)
            with pytest.raises(LLMBuilderError, match="call it once before on the same stream"):
                module.ewc_accumulate_(*groups[2], 1.0)
        for group in groups[2:]:
            module.ewc_accumulate_(*group, 1.0)
    gc.collect()
    assert [table() is not None for table in tables[:2]] == [True, False]
