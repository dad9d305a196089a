"""From data sets to batches, for one model and one run's settings."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ..data import Collator, split
from ..errors import ConfigError
from ..methods import Batch, Example, Key
from ..models import context_length
from .config import FineTuningConfig
from .randomness import undisturbed
from .sampler import check_examples, load_batches

WHAT = {
    "train": "training data",
    "val": "validation data",
    "general": "general data",
    "base_val": "data of the base tasks",
    "replay": "buffer of earlier tasks' replayed examples",
}
"""What people call the data of a run."""


class Loader:
    """Binds data sets to a model's tokenizer and makes their batches.

    Args:
        model: reads the batches; its ``tokenizer``, where it has one, makes the tokens.
        config: of it the data settings matter, and the workers.
    """

    def __init__(self, model: nn.Module, config: FineTuningConfig) -> None:
        self.model = model
        self.config = config
        self.tokenizer = getattr(model, "tokenizer", None)
        pad_id = getattr(self.tokenizer, "pad_token_id", None) or 0
        self._collate = Collator(config.data_collator, pad_id, config.max_seq_length)

    def divide(self, train: Any, val: Any) -> tuple[Any, Any, str, dict[str, str]]:
        """The data to train on, the data to judge by, what to call the latter, and the hashes of both as given."""
        hashes = {"train": self.bind(train, "train")}
        share = self.config.validation_split
        if val is not None and share:
            raise ConfigError(f"validation_split={share} has no effect beside a val_dataset: drop one of them")
        if val is not None:
            return train, val, "validation", hashes | {"val": self.bind(val, "val")}
        if share and not hasattr(train, "task_type"):
            raise ConfigError("validation_split needs a data set of llmbuilder.data; give a sequence in two parts")
        if share:
            return *split(train, share, self.config.seed), "held out", hashes
        warnings.warn(
            "no validation data: perplexity is that of the training data itself; give a val_dataset or "
            "validation_split to see how the model does on what it has not learnt",
            stacklevel=4,
        )
        return train, train, "training", hashes

    def bind(self, dataset: Any, name: str = "") -> str:
        """Tokenise a data set and see that the model can read it; returns a hash of its examples.

        ``name`` is that of its role in the run, for errors.
        """
        if hasattr(dataset, "bind"):
            dataset.bind(self.tokenizer, self.config)
        table = self.model.get_input_embeddings()  # type: ignore[operator]
        with undisturbed():
            return check_examples(
                dataset,
                context_length(self.model),
                getattr(table, "num_embeddings", None),
                self.config.max_seq_length,
                WHAT.get(name, f"data of '{name}'" if name else "data set"),
            )

    def batches(self, sources: Mapping[str, Sequence[Example]], plan: Sequence[list[Key]]) -> Iterator[Batch]:
        """The batches of ``plan``, on the CPU."""
        config = self.config
        return load_batches(
            sources,
            plan,
            self._collate,
            workers=config.dataloader_num_workers,
            pin_memory=config.dataloader_pin_memory and next(self.model.parameters()).device.type == "cuda",
        )

    def to_device(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A batch's tensors where the model is."""
        device = next(self.model.parameters()).device
        return {name: tensor.to(device, non_blocking=True) for name, tensor in tensors.items()}
