"""Keep the embeddings or the lowest blocks as they are, whatever else trains."""

import warnings
from typing import Any

from ..errors import ConfigError
from ..models import blocks, embeddings
from .base import Run


class Freeze:
    """Freezes parts of the model; comes after the method that chose what trains.

    A parameter that several modules share (a head tied to the embeddings) is one: freezing it in one place freezes it
    in all, and a warning says so.

    Args:
        layers: number of blocks to freeze, from the bottom.
        embeddings: freeze the embeddings, of tokens and of positions.

    Raises:
        ConfigError: more layers than the model has blocks.
    """

    name = "freeze"

    def __init__(self, layers: int = 0, embeddings: bool = False) -> None:
        self.layers = layers
        self.embeddings = embeddings

    def prepare(self, run: Run) -> None:
        model: Any = run.model
        stack = blocks(model) if self.layers else []
        if self.layers > len(stack):
            raise ConfigError(f"freeze_layers={self.layers}: {type(model).__name__} has {len(stack)} blocks")
        for _, block in stack[: self.layers]:
            block.requires_grad_(False)
        if self.embeddings:
            tables = [model.get_input_embeddings(), *(table for _, table in embeddings(model))]
            head = model.get_output_embeddings()
            trained = {id(weight) for table in tables for weight in table.parameters() if weight.requires_grad}
            for table in tables:
                table.requires_grad_(False)
            if head is not None and any(id(weight) in trained for weight in head.parameters()):
                warnings.warn("freeze_embeddings freezes the output head too: the two share one weight", stacklevel=2)
