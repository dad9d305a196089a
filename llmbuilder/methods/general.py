"""What the base model is for: data that are given, or text that it makes itself (self-replay, arXiv 1909.03329)."""

import hashlib
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ..errors import ConfigError, LLMBuilderError
from ..models import context_length, end_ids, generate, replacing
from .base import Example, Run

SOURCE = "general"
LENGTH = 256  # longest text in tokens
ROWS = 16  # texts made at once
TEMPERATURE = 1.0  # the model's own distribution


class General:
    """Finds the general data of a run: ``run.general``, which is also the source ``"general"`` of batches.

    Where none was given, text is sampled from the model as it is before anything is changed: each text from the
    tokenizer's begin-of-text token, or from a token drawn at random where there is none, up to an end of text or 256
    tokens. It is made once for a model and seed and kept in ``$LLMBUILDER_CACHE`` (``~/.cache/llmbuilder``); the
    checkpoint has a copy. Where the folder can't be written a warning says so. Another says what it costs. Comes before
    any method that changes the model.

    Args:
        tokens: most tokens to make.
        length: of the longest text, in tokens.
        label: begins the name of the file that the text is kept in.
    """

    name = "general"

    def __init__(self, tokens: int = 16384, length: int = LENGTH, label: str | None = None) -> None:
        self.tokens = tokens
        self.length = min(length, LENGTH)
        self.label = label or "general"
        self._texts: Texts | None = None
        """What a base model made, in this run or an earlier one."""

    def prepare(self, run: Run) -> None:
        if run.general is None:
            self._texts = self._texts or self._find(run)
            run.general = self._texts
        else:
            self._texts = None
        run.sources[SOURCE] = run.general
        self._digest = digest(run.general)

    def state(self) -> dict[str, Any]:
        made = {} if self._texts is None else {"ids": self._texts.ids, "bounds": self._texts.bounds}
        return {"digest": self._digest} | made

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back the text of the checkpoint. Raises ConfigError where the data are given, and others than then."""
        if self._texts is not None and "ids" in state:
            self._texts.ids, self._texts.bounds = state["ids"], state["bounds"]
        elif state.get("digest") != self._digest:
            raise ConfigError("the checkpoint was made with other general data: resume with the data it had")

    def past(self) -> dict[str, Any]:
        """The text that was made: it tells what the first base model was for."""
        return {name: value for name, value in self.state().items() if name != "digest"}

    def load_past(self, past: dict[str, Any]) -> None:
        if "ids" in past:
            self._texts = Texts(past["ids"], past["bounds"])

    def _find(self, run: Run) -> "Texts":
        path = cache_folder() / f"{self.label}-{self._key(run)}.safetensors"
        try:
            tensors = load_file(path)
            return Texts(tensors["ids"], tensors["bounds"])
        except (OSError, SafetensorError, KeyError):  # not there, or damaged: make it (again)
            texts = make_texts(run.model, self.tokens, self.length, run.seed)
        try:
            with replacing(path) as temporary:
                save_file({"ids": texts.ids, "bounds": texts.bounds}, temporary)
        except (OSError, SafetensorError) as error:  # the run can do without the file
            warnings.warn(
                f"the sampled text is not kept for later runs: {path.parent} can't be written ({error}); set "
                "LLMBUILDER_CACHE to a folder that can",
                stacklevel=2,
            )
        return texts

    def _key(self, run: Run) -> str:
        """What the text depends on: every bit of the model, the seed, and how much is made."""
        key = hashlib.sha256(f"{run.seed} {self.tokens} {self.length} {ROWS} {TEMPERATURE}".encode())
        for name, tensor in run.model.state_dict().items():
            key.update(f"{name} {tensor.dtype}".encode())
            key.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return key.hexdigest()[:16]


class Texts(Sequence[Example]):
    """Texts as examples that are learnt whole, kept flat: ``ids`` [tokens] int32, ``bounds`` [texts + 1] int64."""

    def __init__(self, ids: Tensor, bounds: Tensor) -> None:
        self.ids, self.bounds = ids, bounds

    def __len__(self) -> int:
        return len(self.bounds) - 1

    def __getitem__(self, index: Any) -> Any:
        if not -len(self) <= index < len(self):
            raise IndexError(f"text {index} of {len(self)}")
        start, end = self.bounds[index % len(self)], self.bounds[index % len(self) + 1]
        ids = self.ids[start:end].tolist()
        return {"input_ids": ids, "labels": list(ids)}


def make_texts(model: nn.Module, tokens: int, length: int, seed: int) -> Texts:
    """At most ``tokens`` tokens of text in the model's own words, ``length`` in each text at most; the same for equal
    models, seeds and numbers of threads.

    Warns, once it knows, how long that takes. Raises LLMBuilderError for a model that makes no text.
    """
    length = min(length, context_length(model) or length, tokens)
    rows = min(ROWS, -(-tokens // length))
    texts: list[list[int]] = []
    made, started = 0, time.perf_counter()
    for samples in _samples(model, rows, length, seed):
        before = made
        for sample in samples:
            text = sample[: tokens - made]
            if len(text) >= 2:  # a token and one that it predicts
                texts.append(text)
                made += len(text)
        if not before:
            _announce(tokens, (time.perf_counter() - started) * tokens / (rows * length))
        if made == before:
            raise LLMBuilderError("the base model ends its texts before they begin: give a general_dataset")
        if made > tokens - 2:
            break
    bounds = np.cumsum([0, *map(len, texts)])
    return Texts(torch.tensor([token for row in texts for token in row], dtype=torch.int32), torch.from_numpy(bounds))


def _samples(model: nn.Module, rows: int, length: int, seed: int) -> Iterator[list[list[int]]]:
    """Texts without end, some rows at a time, each with the token that it starts from."""
    generator = torch.Generator().manual_seed(seed)
    tokenizer: Any = getattr(model, "tokenizer", None)
    vocabulary = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    first = getattr(tokenizer, "bos_token_id", None)
    known = min(vocabulary, len(tokenizer)) if tokenizer is not None else vocabulary
    special = set(getattr(tokenizer, "all_special_ids", ()))
    plain = [token for token in range(known) if token not in special]
    while True:
        drawn = torch.randint(len(plain), (rows,), generator=generator).tolist()
        starts = [[plain[index] if first is None else first] for index in drawn]
        ends = generate(model, starts, length - 1, TEMPERATURE, stop_ids=end_ids(model), generator=generator)
        yield [start + end for start, end in zip(starts, ends, strict=True)]


def _announce(tokens: int, seconds: float) -> None:
    warnings.warn(
        f"no general_dataset: {tokens:,} tokens of text are sampled from the base model itself, which takes about "
        f"{seconds:.0f} s, once; they are kept in {cache_folder()}",
        stacklevel=5,
    )


def cache_folder() -> Path:
    """Where text is kept that models made: ``$LLMBUILDER_CACHE``, else ``llmbuilder`` in the user's cache folder."""
    own = os.environ.get("LLMBUILDER_CACHE")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llmbuilder"


def digest(examples: Sequence[Example]) -> str:
    """A hash of all ids and labels."""
    key = hashlib.sha256()
    for index in range(len(examples)):
        example = examples[index]
        key.update(np.array([example["input_ids"], example["labels"]], dtype=np.int64).tobytes())
    return key.hexdigest()
