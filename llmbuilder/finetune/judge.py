"""Judging a model on a data set, within a run or without one."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import LLMBuilderError
from ..nn.heads import LanguageHead
from .evaluate import GENERATED_PAIRS, Score, bleu, continuations, exact_match, score
from .loader import Loader
from .randomness import undisturbed
from .results import EvalResults, perplexity
from .sampler import in_order


class Judge:
    """Judges a model as it is now, in evaluation mode; draws from no random state of the caller's.

    Args:
        model: on the device where it shall run.
        loader: makes the batches.
        bf16: autocast to bf16; None does so where the model has a bf16 weight.
        parts: gives a data set in parts, the model set for each until the next one is asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        loader: Loader,
        bf16: bool | None = None,
        parts: Callable[[Any], Iterator[Any]] = lambda dataset: iter([dataset]),
    ) -> None:
        self.model = model
        self.loader = loader
        self.bf16 = any(w.dtype == torch.bfloat16 for w in model.parameters()) if bf16 is None else bf16
        self.parts = parts
        self.head = LanguageHead(model)

    def score(self, dataset: Any) -> Score:
        """Cross-entropy and accuracy over all of a bound data set.

        Raises:
            LLMBuilderError: it has no targets.
        """
        total = Score(0.0, 0, 0)
        for part in self.parts(dataset):
            plan = in_order(len(part), self.loader.config.batch_size)
            batches = self.loader.batches({"train": part}, plan)
            with self._judging():
                total = total + score(self.head, (self.loader.to_device(batch.tensors) for batch in batches))
        if not total.tokens:
            raise LLMBuilderError("the evaluation data has no token to predict; check its labels")
        return total

    def evaluate(self, dataset: Any) -> EvalResults:
        """Loss and perplexity over all of ``dataset``; BLEU and exact match over greedy continuations of at most 64
        pairs that its ``generation_pairs`` gives, where it and the model's tokenizer are there.

        Raises:
            LLMBuilderError: no examples or no targets, or examples longer than the model's context.
        """
        self.loader.bind(dataset)
        total = self.score(dataset)
        compared: list[tuple[str, str]] = []
        limit = max(1, GENERATED_PAIRS // len(getattr(dataset, "tasks", [dataset])))
        for part in self.parts(dataset):
            pairs = part.generation_pairs(limit) if hasattr(part, "generation_pairs") else []
            with self._judging():
                batch_size = self.loader.config.batch_size
                compared += continuations(self.model, self.loader.tokenizer, pairs, batch_size) if pairs else []
        exact = getattr(dataset, "metric", None) == "exact_match"
        return EvalResults(
            loss=total.loss,
            perplexity=perplexity(total.loss),
            bleu_score=bleu(compared),
            task_accuracy=exact_match(compared) if exact else total.accuracy,
            tokens=total.tokens,
            generations=compared,
        )

    @contextmanager
    def _judging(self) -> Iterator[None]:
        self.model.eval()
        device = next(self.model.parameters()).device.type
        with undisturbed(), torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=self.bf16):
            yield
