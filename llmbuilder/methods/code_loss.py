"""A loss for code: what a program means counts more than how it is laid out."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..data.code import COMMENT, KEYWORD, LAYOUT, LITERAL, NAME, OPERATOR, PUNCTUATION, Classes, token_classes
from ..data.examples import IGNORED
from ..errors import LLMBuilderError
from .base import Example, Run

WEIGHTS = {NAME: 1.0, LITERAL: 1.0, KEYWORD: 1.0, OPERATOR: 1.0, COMMENT: 1.0, PUNCTUATION: 0.5, LAYOUT: 0.25}


class CodeLoss:
    """Weighs each target of the training data by its lexical class; comes after methods that change the examples.

    Weights are divided by their mean over all targets of the data, so that the loss keeps its scale, and equal weights
    give the plain cross-entropy, bit for bit. Evaluation is not weighed.

    Args:
        language: of the code.
        weights: of each class of ``data.code``.

    Raises:
        LLMBuilderError: the model has no tokenizer to read the tokens by.
    """

    name = "code loss"

    def __init__(self, language: str, weights: Mapping[int, float] = WEIGHTS) -> None:
        self.language = language
        self.table = np.array([weights[kind] for kind in range(len(weights))])

    def prepare(self, run: Run) -> None:
        tokenizer: Any = getattr(run.model, "tokenizer", None)
        if tokenizer is None:
            raise LLMBuilderError("code_specific_loss reads the text of tokens, and the model has no tokenizer")
        examples = run.sources["train"]
        found = [
            token_classes(tokenizer, list(row["input_ids"]), self.language)
            for row in map(examples.__getitem__, range(len(examples)))
        ]
        counts = np.zeros(len(self.table))
        for index, classes in enumerate(found):
            targets = np.array(examples[index]["labels"][1:]) != IGNORED
            counts += np.bincount(classes[1:][targets], minlength=len(self.table))
        present = self.table[counts > 0]
        equal = len(present) > 0 and (present == present[0]).all()
        mean = float(present[0]) if equal else float(self.table @ counts / max(counts.sum(), 1))
        run.sources["train"] = Weighed(examples, found, (self.table / mean).astype(np.float32))


class Weighed(Sequence[Example]):
    """Examples with the weight of each token's class."""

    def __init__(self, examples: Sequence[Example], classes: Sequence[Classes], table: NDArray[np.float32]) -> None:
        self._examples, self._classes, self._table = examples, classes, table

    def __len__(self) -> int:
        return len(self._examples)

    def __getitem__(self, index: Any) -> Any:
        return {**self._examples[index], "weights": self._table[self._classes[index]].tolist()}
