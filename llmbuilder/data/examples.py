"""Tokenised examples, kept flat in numpy arrays, and the binding of a dataset to a tokenizer."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any, NotRequired, Protocol, TypeAlias, TypedDict

import numpy as np
from numpy.typing import NDArray

from ..errors import LLMBuilderError
from .report import DataReport

IGNORED = -100
"""The label of a position that isn't learnt."""

Tokenizer: TypeAlias = Any
"""A transformers fast tokenizer."""

Ids: TypeAlias = NDArray[np.int32]
Marks: TypeAlias = NDArray[np.bool_]


class Example(TypedDict):
    """``labels[i]`` is ``input_ids[i]`` or -100; the shift by one happens in the loss. ``weights[i]`` is the factor of
    the loss of ``labels[i]``; 1 where an example has none."""

    input_ids: list[int]
    labels: list[int]
    weights: NotRequired[list[float]]


GenerationPair: TypeAlias = tuple[list[int], str]
"""Prompt ids, and the reference text that should follow them."""


class Dataset(Protocol):
    """What the tuner may rely on."""

    @property
    def task_type(self) -> str: ...

    @property
    def metric(self) -> str:
        """``exact_match`` or ``next_token``: how accuracy is measured."""

    @property
    def report(self) -> DataReport: ...

    def bind(self, tokenizer: Tokenizer, config: Any) -> None: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Example: ...

    def generation_pair(self, index: int) -> GenerationPair | None: ...

    def generation_pairs(self, limit: int) -> list[GenerationPair]: ...


@dataclass(frozen=True)
class Settings:
    """The settings that shape examples; None where neither the dataset nor the configuration gives one."""

    task_type: str | None = None
    max_seq_length: int | None = None
    turn_separator: str | None = None
    response_loss_only: bool | None = None
    max_turns: int | None = None

    def over(self, config: Any) -> "Settings":
        """These settings, and those of ``config`` where there is none. Of two lengths the smaller one holds."""
        merged: dict[str, Any] = {}
        for field in fields(self):
            own, configured = getattr(self, field.name), getattr(config, field.name, None)
            merged[field.name] = configured if own is None else own
        if self.task_type is None and getattr(config, "dialogue_format", False):
            merged["task_type"] = "conversation"
        lengths = [length for length in (self.max_seq_length, getattr(config, "max_seq_length", None)) if length]
        merged["max_seq_length"] = min(lengths, default=None)
        return Settings(**merged)


@dataclass(frozen=True)
class Tokenised:
    """One example before it is stored. ``prompt`` tokens of it (0: none) are what a generation starts from."""

    ids: Ids
    marks: Marks
    prompt: int = 0
    reference: str | None = None


class Examples:
    """Examples in three flat arrays: a 20 MB text costs 5 bytes a token, and workers share the memory."""

    def __init__(self, tokenised: Iterable[Tokenised]) -> None:
        items = list(tokenised)
        self._ids: Ids = np.concatenate([np.empty(0, np.int32), *[item.ids for item in items]])
        self._marks: Marks = np.concatenate([np.empty(0, np.bool_), *[item.marks for item in items]])
        self._bounds = np.cumsum([0, *[len(item.ids) for item in items]])
        self._prompts = [(item.prompt, item.reference) for item in items]

    def __len__(self) -> int:
        return len(self._prompts)

    def __getitem__(self, index: int) -> Example:
        ids, marks = self._slices(index)
        return {"input_ids": ids.tolist(), "labels": np.where(marks, ids, IGNORED).tolist()}

    def generation_pair(self, index: int, tokenizer: Tokenizer) -> GenerationPair | None:
        """Prompt and reference of one example; where no reference text is known, what follows the prompt, decoded.

        None where the example has no prompt that leaves something to generate, or nothing can decode the reference.
        """
        ids, _ = self._slices(index)
        prompt, reference = self._prompts[index]
        if not 0 < prompt < len(ids) or (reference is None and tokenizer is None):
            return None
        if reference is None:
            reference = tokenizer.decode(ids[prompt:].tolist(), skip_special_tokens=True)
        return ids[:prompt].tolist(), reference

    def count(self, report: DataReport) -> None:
        """Write the numbers of examples, tokens and targets into the report."""
        report.examples = len(self)
        report.tokens = len(self._ids)
        firsts = self._bounds[:-1][np.diff(self._bounds) > 0]
        report.targets = int(self._marks.sum() - self._marks[firsts].sum())

    def _slices(self, index: int) -> tuple[Ids, Marks]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of {len(self)}")
        index %= len(self)
        start, end = self._bounds[index], self._bounds[index + 1]
        return self._ids[start:end], self._marks[start:end]


Build: TypeAlias = Callable[[Tokenizer, Settings, DataReport], Examples]


class Binding:
    """The state of a dataset between rows and examples: tokenised once for each tokenizer and settings.

    Args:
        build: makes the examples and completes the report.
        report: what reading has found; binding starts from a copy of it each time.
        tokenizer: the dataset's own, or None to take the one that ``bind`` brings.
        settings: the dataset's own settings.
        tokenised: the rows are tokenised already, so that no tokenizer is needed.
    """

    def __init__(
        self,
        build: Build,
        report: DataReport,
        tokenizer: Tokenizer | None,
        settings: Settings,
        *,
        tokenised: bool = False,
    ) -> None:
        self._build = build
        self._needs_tokenizer = not tokenised
        self._reading = report
        self._own_tokenizer = tokenizer
        self._own_settings = settings
        self._key: tuple[Any, ...] | None = None
        self.settings = settings
        """Those of the examples: the dataset's own, and once bound the configuration's."""
        self._tokenizer = tokenizer
        self._examples: Examples | None = None
        self.report = report

    def bind(self, tokenizer: Tokenizer, config: Any) -> None:
        """Tokenise, unless that was done with the same tokenizer and settings.

        Raises:
            LLMBuilderError: no tokenizer, one that isn't fast, or one whose vocabulary differs from the dataset's own;
                nothing left to train on.
        """
        own = self._own_tokenizer
        if own is not None and tokenizer is not None and not _same_vocabulary(own, tokenizer):
            raise LLMBuilderError(
                "the dataset was given a tokenizer whose vocabulary is not the model's; "
                "leave tokenizer= out, and the model's is used"
            )
        self._tokenise(tokenizer if own is None else own, self._own_settings.over(config))

    def examples(self) -> Examples:
        """The examples; of a dataset with a tokenizer of its own also before ``bind``."""
        if self._examples is None:
            if self._own_tokenizer is None:
                raise LLMBuilderError(
                    "this dataset is not tokenised yet: hand it to a FineTuner, or call bind(tokenizer, config)"
                )
            self._tokenise(self._own_tokenizer, self._own_settings)
        assert self._examples is not None
        return self._examples

    def generation_pair(self, index: int) -> GenerationPair | None:
        """Prompt and reference of one example, or None where it has no prompt that leaves something to generate."""
        return self.examples().generation_pair(index, self._tokenizer)

    def _tokenise(self, tokenizer: Tokenizer, settings: Settings) -> None:
        if self._needs_tokenizer:
            _require_fast(tokenizer)
        # a tokenizer can change in place: tokens added, another chat template
        size = 0 if tokenizer is None else len(tokenizer)
        key = (id(tokenizer), size, getattr(tokenizer, "chat_template", None), settings)
        if key == self._key:
            return
        report = self._reading.copy()
        examples = self._build(tokenizer, settings, report)
        examples.count(report)
        report.require_examples()
        self._key, self._tokenizer, self.settings = key, tokenizer, settings
        self._examples, self.report = examples, report


def special_ids(tokenizer: Tokenizer) -> set[int]:
    """The ids of all special tokens: of those with a role, and of added ones, which ``all_special_ids`` leaves out once
    a tokenizer was saved and loaded (the turns' marks of Llama 3, Phi 3 and Gemma 3)."""
    added = {index for index, token in tokenizer.added_tokens_decoder.items() if token.special}
    return added | set(tokenizer.all_special_ids)


def _same_vocabulary(one: Tokenizer, other: Tokenizer) -> bool:
    return one is other or one.get_vocab() == other.get_vocab()


def _require_fast(tokenizer: Tokenizer) -> None:
    if tokenizer is None:
        raise LLMBuilderError("the model has no tokenizer; give the dataset one: tokenizer=…")
    if not getattr(tokenizer, "is_fast", False):
        raise LLMBuilderError(f"{type(tokenizer).__name__} is not a fast tokenizer; load it with use_fast=True")


def collect_pairs(dataset: Dataset, limit: int) -> list[GenerationPair]:
    """The first ``limit`` generation pairs of a dataset."""
    pairs: list[GenerationPair] = []
    for index in range(len(dataset)):
        if len(pairs) >= limit:
            break
        pair = dataset.generation_pair(index)
        if pair is not None:
            pairs.append(pair)
    return pairs
