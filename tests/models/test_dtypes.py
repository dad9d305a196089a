"""Names of dtypes, and what the processor computes by itself."""

import platform
from pathlib import Path

import pytest
import torch

from llmbuilder.errors import ConfigError
from llmbuilder.models import computes_bf16
from llmbuilder.models.dtypes import parse_dtype


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("fp32", torch.float32), ("bf16", torch.bfloat16), ("fp16", torch.float16), (torch.float64, torch.float64)],
)
def test_a_name_is_a_dtype(name: str | torch.dtype, dtype: torch.dtype) -> None:
    assert parse_dtype(name) is dtype


def test_auto_is_left_open() -> None:
    assert parse_dtype("auto") is None


def test_an_unknown_name_is_refused_with_the_nearest() -> None:
    with pytest.raises(ConfigError, match="got 'fp23'; did you mean 'fp32'"):
        parse_dtype("fp23")


@pytest.mark.skipif(platform.machine() != "x86_64" or platform.system() != "Linux", reason="reads /proc/cpuinfo")
def test_the_processor_says_whether_it_computes_bf16() -> None:
    flags = next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split()
    assert computes_bf16("cpu") == ("avx512_bf16" in flags or "amx_tile" in flags)
