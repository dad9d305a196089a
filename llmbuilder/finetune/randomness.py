"""Every random state that a run draws from: to seed, save and restore, and to leave the caller's alone."""

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

State = tuple[dict[str, Tensor], dict[str, Any]]


def seed_all(seed: int) -> None:
    """Seed torch (all devices), ``random`` and numpy."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def random_state() -> State:
    """The states as tensors, and as values that JSON can hold."""
    tensors = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    kind, words, *rest = np.random.get_state()
    return tensors, {"python": random.getstate(), "numpy": [kind, np.asarray(words).tolist(), *rest]}


def set_random_state(state: State) -> None:
    """Take back what ``random_state`` returned, before or after a journey through JSON."""
    tensors, values = state
    torch.set_rng_state(tensors["cpu"])
    for name, tensor in tensors.items():
        if name != "cpu":
            torch.cuda.set_rng_state(tensor, name)
    version, words, gauss = values["python"]
    random.setstate((version, tuple(words), gauss))
    kind, keys, *rest = values["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))


@contextmanager
def undisturbed() -> Iterator[None]:
    """Whatever is drawn inside, the states are the same after as before."""
    state = random_state()
    try:
        yield
    finally:
        set_random_state(state)
