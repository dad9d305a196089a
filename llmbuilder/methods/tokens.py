"""New special tokens: in the tokenizer, and with rows of their own in the embedding and the output layer."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import nn

from ..errors import ConfigError
from ..models.vocabulary import add_tokens
from ..nn import LoRAConfig, list_adapters


class Adapted(Protocol):
    """A method that trains adapters made of ``config``."""

    config: LoRAConfig


class SpecialTokens:
    """Adds tokens before the data are tokenised; their rows start at the mean of the others and train.

    Where adapters train, only the new rows do beside them, and an adapter's folder holds them and the tokenizer.

    Args:
        tokens: what to add; those that the tokenizer has already stay as they are.
        adapted: the method that trains adapters; None where all weights train.
    """

    name = "special tokens"

    def __init__(self, tokens: Sequence[str], adapted: Adapted | None) -> None:
        self.tokens = tokens
        self.adapted = adapted

    def extend(self, model: nn.Module) -> None:
        extend_vocabulary(model, self.tokens, self.adapted)


def extend_vocabulary(model: nn.Module, tokens: Sequence[str], adapted: Adapted | None) -> None:
    """Add tokens to the model, and have the adapter train their rows.

    Raises ConfigError for an adapter that is there already, and has no rows for tokens that are new.
    """
    tokenizer: Any = getattr(model, "tokenizer", None)
    known = {} if tokenizer is None else tokenizer.get_vocab()  # without one, add_tokens says so
    missing = [token for token in tokens if token not in known]
    if missing and adapted is not None and list_adapters(model):
        raise ConfigError(
            f"the earlier run's adapter has no rows for the new tokens {', '.join(missing)}: name them "
            "in the first run, or merge the adapter into the model and start a new one"
        )
    new = add_tokens(model, tokens)
    if adapted is not None:
        rows = [*adapted.config.trainable_token_indices, *new]
        adapted.config = adapted.config.model_copy(update={"trainable_token_indices": rows})
