"""New tokens for a model: in its tokenizer, its embedding and its output layer."""

from collections.abc import Sequence
from typing import Any

import torch
from tokenizers import AddedToken
from torch import nn

from ..errors import LLMBuilderError


def add_tokens(model: nn.Module, tokens: Sequence[str]) -> list[int]:
    """Add special tokens to the model's tokenizer, in place, and see that the model has rows for them.

    Args:
        model: with a ``tokenizer``.
        tokens: those that the tokenizer has already are left as they are.

    Returns:
        The ids of those that are new, in order. Their rows in the embedding and the output layer start at the mean of
        the tokens' that were there, also where the model had rows to spare; all others keep their bits.

    Raises:
        LLMBuilderError: the model has no tokenizer.
    """
    tokenizer: Any = getattr(model, "tokenizer", None)
    if tokenizer is None:
        raise LLMBuilderError("new tokens need a tokenizer to add them to, and the model has none")
    known, size = tokenizer.get_vocab(), len(tokenizer)
    new = [token for token in dict.fromkeys(tokens) if token not in known]
    tokenizer.add_tokens([AddedToken(token, special=True, normalized=False) for token in new])
    grow_vocabulary(model, len(tokenizer))
    ids = [int(index) for index in tokenizer.convert_tokens_to_ids(new)]
    with torch.no_grad():
        for table in _tables(model):
            table[ids] = table[:size].mean(0)
    return ids


@torch.no_grad()
def grow_vocabulary(model: nn.Module, size: int) -> None:
    """Give the embedding and the output layer ``size`` rows, the new ones the mean of the old; more rows stay."""
    owner: Any = model
    before = owner.get_input_embeddings().weight.shape[0]
    if size <= before:
        return
    owner.resize_token_embeddings(size, mean_resizing=False)
    for table in _tables(model):
        table[before:] = table[:before].mean(0)


def _tables(model: Any) -> list[torch.Tensor]:
    """What has a row for each token: the embedding, the output layer's weight and its bias, shared ones once."""
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    found = [getattr(layer, name, None) for layer in layers for name in ("weight", "bias")]
    return list({id(table): table for table in found if table is not None}.values())
