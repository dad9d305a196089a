"""Every random state that there is, through JSON and back."""

import json
import random
from typing import Any

import numpy as np
import torch

from llmbuilder.finetune.randomness import random_state, seed_all, set_random_state, undisturbed


def draws() -> list[Any]:
    return [torch.rand(3).tolist(), random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]


def test_a_state_that_went_through_json_repeats_every_draw() -> None:
    seed_all(3)
    draws()  # odd numbers of normal draws leave one in store
    tensors, values = random_state()
    wanted = [draws(), draws()]
    set_random_state((tensors, json.loads(json.dumps(values))))
    assert [draws(), draws()] == wanted


def test_the_seed_decides() -> None:
    seed_all(5)
    first = draws()
    seed_all(6)
    other = draws()
    seed_all(5)
    assert draws() == first
    assert all(a != b for a, b in zip(first, other, strict=True))


def test_what_is_drawn_inside_leaves_the_states_as_they_were() -> None:
    seed_all(7)
    wanted = draws()
    seed_all(7)
    try:
        with undisturbed():
            seed_all(99)
            draws()
            raise ZeroDivisionError
    except ZeroDivisionError:
        pass
    assert draws() == wanted
