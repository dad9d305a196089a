"""A hash of a model's weights, by which a run knows the model that it had."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def weights_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 over the name, dtype and bits of each tensor, in their order."""
    key = hashlib.sha256()
    for name, tensor in tensors:
        key.update(f"{name} {tensor.dtype}".encode())
        key.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return key.hexdigest()
