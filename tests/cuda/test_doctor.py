"""The doctor's checks of every operator, on the emulated kernels: what it will run on a machine with a GPU."""

from llmbuilder import doctor
from llmbuilder.ops import _backend


def test_every_operator_of_the_backend_is_right(cuda):
    found = list(doctor.checks("cpu"))
    assert {check.operator for check in found} == {name for name, row in _backend.OPERATORS.items() if "cuda" in row}
    assert {check.backend for check in found} == {"cuda"}
    assert [check for check in found if check.wrong] == []
