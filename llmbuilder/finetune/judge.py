"""Judging a model on a data set: outside a run, and by the tuner within one."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..errors import LLMBuilderError
from ..models import context_length
from ..nn.heads import LanguageHead
from . import sampler
from .config import FineTuningConfig
from .evaluate import GENERATED_PAIRS, Score, bleu, continuations, exact_match, score
from .randomness import undisturbed
from .results import EvalResults, perplexity


class Judge:
    """Judges a model as it is, whatever its mode; draws from no random state of the caller's.

    Args:
        model: on the device where it shall run.
        config: of it the data settings, ``batch_size`` and the number of workers matter.
        bf16: autocast to bf16; None does so where the model has a bf16 weight.
    """

    def __init__(self, model: nn.Module, config: FineTuningConfig | None = None, bf16: bool | None = None) -> None:
        self.model = model
        self.config = config or FineTuningConfig()
        self.bf16 = any(w.dtype == torch.bfloat16 for w in model.parameters()) if bf16 is None else bf16
        self.head = LanguageHead(model)
        self.tokenizer = getattr(model, "tokenizer", None)
        self._collate = sampler.Collate(self.config, self.tokenizer)

    def bind(self, dataset: Any) -> str:
        """Tokenise a data set and see that the model can read it; returns a hash of its examples."""
        if hasattr(dataset, "bind"):
            dataset.bind(self.tokenizer, self.config)
        return sampler.check_examples(dataset, context_length(self.model))

    def score(self, dataset: Any) -> Score:
        """Cross-entropy and accuracy over all of a bound data set.

        Raises:
            LLMBuilderError: it has no targets.
        """
        device = next(self.model.parameters()).device
        plan = sampler.in_order(len(dataset), self.config.batch_size)
        workers = self.config.dataloader_num_workers
        batches = sampler.load_batches({"train": dataset}, plan, self._collate, workers=workers)
        with self._judging():
            moved = ({name: tensor.to(device) for name, tensor in batch.tensors.items()} for batch in batches)
            total = score(self.head, moved)
        if not total.tokens:
            raise LLMBuilderError("the evaluation data has no token to predict; check its labels")
        return total

    def evaluate(self, dataset: Any) -> EvalResults:
        """Loss and perplexity over all of ``dataset``; BLEU and exact match over greedy continuations of at most 64
        pairs that its ``generation_pairs`` gives, where it and the model's tokenizer are there.

        Raises:
            LLMBuilderError: no examples or no targets, or examples longer than the model's context.
        """
        self.bind(dataset)
        total = self.score(dataset)
        with self._judging():
            pairs = dataset.generation_pairs(GENERATED_PAIRS) if hasattr(dataset, "generation_pairs") else []
            compared = continuations(self.model, self.tokenizer, pairs, self.config.batch_size) if pairs else []
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
        training, device = self.model.training, next(self.model.parameters()).device.type
        self.model.eval()
        try:
            with undisturbed(), torch.no_grad(), torch.autocast(device, torch.bfloat16, enabled=self.bf16):
                yield
        finally:
            self.model.train(training)
