"""The backend operators as calls on random tensors, with what they must give, for any module that has them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import Tensor

from llmbuilder.ops import reference

SCALING = 0.5
SEED, STREAM = 0x1_2345_6789_ABCD, 3


@dataclass(frozen=True)
class Case:
    operator: str
    dtype: torch.dtype
    M: int = 1
    N: int = 1
    K: int = 1
    r: int = 1
    threshold: int = 0
    sliced: bool = False  # matrices are columns 1 to the last but one of wider ones: aligned to nothing
    tf32: bool = False

    def __str__(self) -> str:
        marks = "-sliced" * self.sliced + "-tf32" * self.tf32 + f"-t{self.threshold}" * bool(self.threshold)
        return f"{self.operator}-{str(self.dtype)[6:]}-{self.M}x{self.N}x{self.K}-r{self.r}{marks}"


@dataclass
class Drawn:
    """Tensors of a case; ``exact`` and ``plain`` are the results of the formula in fp64 and in the case's dtype."""

    case: Case
    tensors: dict[str, Tensor]
    seed: Tensor = field(default_factory=lambda: torch.tensor(SEED))

    def call(self, module: ModuleType) -> tuple[Tensor, ...]:
        return CALLS[self.case.operator](module, self)

    @property
    def exact(self) -> tuple[Tensor, ...]:
        return self._formula(lambda t: t.double())

    @property
    def plain(self) -> tuple[Tensor, ...]:
        return self._formula(_tf32 if self.case.tf32 else lambda t: t)

    def _formula(self, convert: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        values = {name: convert(tensor) for name, tensor in self.tensors.items()}
        return FORMULAS[self.case.operator](values, lambda t: self._drop(t))

    def _drop(self, t: Tensor) -> Tensor:
        return reference.dropout(t, self.case.threshold, self.seed, STREAM) if self.case.threshold else t


def draw(case: Case) -> Drawn:
    M, N, K, r = case.M, case.N, case.K, case.r
    shapes = {"x": (M, K), "W": (N, K), "A": (r, K), "B": (N, r), "S": (M, r), "dY": (M, N)}
    tensors = {name: _matrix(case, *shape) for name, shape in shapes.items()}
    tensors["bias"] = torch.randn(N).to(case.dtype)
    return Drawn(case, tensors)


def _matrix(case: Case, rows: int, columns: int) -> Tensor:
    margin = int(case.sliced)
    wide = torch.full((rows, columns + 2 * margin), torch.nan, dtype=case.dtype)
    wide[:, margin : margin + columns] = torch.randn(rows, columns).to(case.dtype)
    return wide[:, margin : margin + columns]


def _tf32(t: Tensor) -> Tensor:
    """Rounded to ten bits of mantissa, ties away from zero."""
    return ((t.contiguous().view(torch.int32) + 0x1000) & -0x2000).view(torch.float32)


CALLS: dict[str, Callable[[ModuleType, Drawn], tuple[Tensor, ...]]] = {
    "dropout": lambda m, d: (m.dropout(d.tensors["x"].contiguous(), d.case.threshold, d.seed, STREAM),),
    "lora_shrink": lambda m, d: (m.lora_shrink(d.tensors["x"], d.tensors["A"], d.case.threshold, d.seed, STREAM),),
    "lora_expand": lambda m, d: (m.lora_expand(d.tensors["S"], d.tensors["B"], d.tensors["bias"], SCALING),),
    "lora_grad_sb": lambda m, d: m.lora_grad_sb(d.tensors["dY"], d.tensors["S"], d.tensors["B"], SCALING),
    "lora_grad_ax": lambda m, d: m.lora_grad_ax(
        d.tensors["x"], d.tensors["S"], d.tensors["A"], d.case.threshold, d.seed, STREAM, True
    ),
    "lora_fused": lambda m, d: (
        m.lora_fused(d.tensors["x"], d.tensors["W"], d.tensors["bias"], d.tensors["S"], d.tensors["B"], SCALING),
    ),
    "lora_fused_grad": lambda m, d: (
        m.lora_fused_grad(
            d.tensors["dY"], d.tensors["W"], d.tensors["S"], d.tensors["A"], d.case.threshold, d.seed, STREAM
        ),
    ),
}
FORMULAS: dict[str, Callable[[dict[str, Tensor], Callable[[Tensor], Tensor]], tuple[Tensor, ...]]] = {
    "dropout": lambda t, drop: (drop(t["x"]),),
    "lora_shrink": lambda t, drop: (drop(t["x"]) @ t["A"].t(),),
    "lora_expand": lambda t, drop: (SCALING * t["S"] @ t["B"].t() + t["bias"],),
    "lora_grad_sb": lambda t, drop: (SCALING * t["dY"] @ t["B"], (SCALING * t["dY"].t() @ t["S"])),
    "lora_grad_ax": lambda t, drop: ((t["S"].t() @ drop(t["x"])), drop(t["S"] @ t["A"])),
    "lora_fused": lambda t, drop: (t["x"] @ t["W"].t() + SCALING * t["S"] @ t["B"].t() + t["bias"],),
    "lora_fused_grad": lambda t, drop: (t["dY"] @ t["W"] + drop(t["S"] @ t["A"]),),
}
