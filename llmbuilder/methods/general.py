"""What the base model is for: data that are given, or text that it makes itself."""

import hashlib
import json
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from ..data.examples import special_ids
from ..errors import ConfigError
from ..models import end_ids, replacing, weights_digest
from .base import Example, Run
from .own_words import ROWS, TEMPERATURE, Texts, known_tokens, make_texts, template_of

SOURCE = "general"
LENGTH = 256  # longest text in tokens
ORIGIN = ("_name_or_path", "transformers_version")  # of a config, or of one inside it
PARTS = ("ids", "bounds", "starts")  # of Texts, in the order of its arguments


class General:
    """Finds the general data of a run: ``run.general``, which is also the source ``"general"`` of batches.

    Where none was given, text is sampled from the model as it is before anything is changed, conversations where it
    has a chat template (``own_words.py``), each of 256 tokens at most. It is made once for a model and seed and kept in
    ``$LLMBUILDER_CACHE`` (``~/.cache/llmbuilder``); the checkpoint has a copy. Where the folder can't be written a
    warning says so. Another says what it costs. Comes before any method that changes the model.

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

    def extend(self, model: nn.Module) -> None:
        self._known = known_tokens(model)  # before methods that come later add tokens

    def prepare(self, run: Run) -> None:
        if run.general is None:
            self._texts = self._find(run) if self._texts is None else self._cut(self._texts)
            run.general = self._texts
        else:
            self._texts = None
        run.sources[SOURCE] = run.general
        self._digest = digest(run.general)

    def state(self) -> dict[str, Any]:
        made = {} if self._texts is None else self._texts.tensors()
        return {"digest": self._digest} | made

    def load_state(self, state: dict[str, Any]) -> None:
        """Take back the text of the checkpoint. Raises ConfigError where the data are given, and others than then."""
        if self._texts is not None and "ids" in state:
            self._texts.ids, self._texts.bounds, self._texts.starts = (state[name] for name in PARTS)
        elif state.get("digest") != self._digest:
            raise ConfigError("the checkpoint was made with other general data: resume with the data it had")

    def past(self) -> dict[str, Any]:
        """The text that was made: it tells what the first base model was for."""
        return {name: value for name, value in self.state().items() if name != "digest"}

    def load_past(self, past: dict[str, Any]) -> None:
        if "ids" in past:
            self._texts = Texts(*(past[name] for name in PARTS))

    def _cut(self, texts: Texts) -> Texts:
        """An earlier task's text, as long as this one's settings allow."""
        cut = texts.cut(self.length, self.tokens)
        if not len(cut):
            raise ConfigError(
                f"of the text that an earlier task's base model made, {self.length} tokens a text and {self.tokens} in "
                "all leave nothing to learn: raise max_seq_length or general_tokens, or give a general_dataset"
            )
        return cut

    def _find(self, run: Run) -> Texts:
        path = cache_folder() / f"{self.label}-{self._key(run)}.safetensors"
        try:
            tensors = load_file(path)
            kept = Texts(*(tensors[name] for name in PARTS))
        except (OSError, SafetensorError, KeyError):
            kept = None
        if kept is not None and kept.are_whole():
            return kept
        # not there, or damaged: make it (again)
        texts = make_texts(run.model, self._known, self.tokens, self.length, run.seed, str(cache_folder()))
        try:
            with replacing(path) as temporary:
                save_file(texts.tensors(), temporary)
        except (OSError, SafetensorError) as error:  # the run can do without the file
            warnings.warn(
                f"the sampled text is not kept for later runs: {path.parent} can't be written ({error}); set "
                "LLMBUILDER_CACHE to a folder that can",
                stacklevel=2,
            )
        return texts

    def _key(self, run: Run) -> str:
        """What the text depends on: every bit of the model and its settings, the tokenizer's tokens, the seed, how much
        is made, and how a chat is written."""
        template = template_of(run.model, self.length)
        frame = template and template.frame
        weights = weights_digest(run.model.state_dict().items())
        text = f"{run.seed} {self.tokens} {self.length} {self._known} {ROWS} {TEMPERATURE} {frame} {weights}"
        text += f" {_settings(run.model)} {end_ids(run.model)} {_tokens(run.model)}"
        return hashlib.sha256(text.encode()).hexdigest()[:16]


def _settings(model: nn.Module) -> str:
    """The model's config, but for where it was found and what wrote it."""
    config: Any = model.config
    values = json.dumps(config.to_dict() if hasattr(config, "to_dict") else vars(config), sort_keys=True, default=str)
    return str(json.loads(values, object_hook=lambda part: {k: part[k] for k in part if k not in ORIGIN}))


def _tokens(model: nn.Module) -> str:
    tokenizer: Any = getattr(model, "tokenizer", None)
    if tokenizer is None:
        return ""
    return f"{tokenizer.bos_token_id} {sorted(special_ids(tokenizer))} {sorted(tokenizer.get_vocab().items())}"


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
