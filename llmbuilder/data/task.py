"""Datasets of requests with responses, and of conversations."""

from typing import Any

from ..errors import ConfigError, nearest
from .encode import RequestBuilder
from .examples import Binding, Example, GenerationPair, Settings, Tokenizer, collect_pairs
from .formats import Data, read_rows
from .report import DataReport
from .templates import TASKS


class TaskDataset:
    """Requests with responses, of which the response is learnt, its end token included.

    Args:
        path: a file, a folder or rows in memory, in the shapes of ``shapes.PAIR_COLUMNS`` (Alpaca, question and answer,
            document and summary, prompt and completion) or as messages (OpenAI, ShareGPT). For ``question_answering``
            also text of ``Question: …`` and ``Answer: …`` lines.
        task_type: ``instruction``, ``question_answering``, ``summarization``, ``code`` or ``conversation``; picks the
            prompt (``templates.TASKS``) and the metric: ``exact_match`` for ``question_answering``, else
            ``next_token``.
        tokenizer: a fast tokenizer; None takes the model's when the tuner binds the dataset.
        max_seq_length: longest example in tokens; the configuration's holds too. What is longer is cut at its end, and
            reported; an example that would lose its whole response is left out, and named.

    Raises:
        ConfigError: an unknown ``task_type``.
        LLMBuilderError: what ``read_rows`` raises; when tokenised, no example left.
    """

    def __init__(
        self, path: Data, task_type: str, tokenizer: Tokenizer | None = None, *, max_seq_length: int | None = None
    ) -> None:
        if task_type == "language_modeling":
            raise ConfigError("task_type 'language_modeling' has no responses: use TextDataset")
        if task_type not in TASKS:
            raise ConfigError(f"unknown task_type '{task_type}'{nearest(task_type, TASKS)} Known: {', '.join(TASKS)}")
        self.task_type = task_type
        self.metric = TASKS[task_type].metric
        reading = read_rows(path)
        self._binding = Binding(
            RequestBuilder(reading.rows), reading.report, tokenizer, Settings(task_type, max_seq_length)
        )

    def bind(self, tokenizer: Tokenizer, config: Any) -> None:
        """Tokenise with this tokenizer and the settings of ``config`` that the dataset wasn't given; idempotent."""
        self._binding.bind(tokenizer, config)

    @property
    def report(self) -> DataReport:
        """Rows read and, once bound, what became of them."""
        return self._binding.report

    def __len__(self) -> int:
        return len(self._binding.examples())

    def __getitem__(self, index: int) -> Example:
        return self._binding.examples()[index]

    def generation_pair(self, index: int) -> GenerationPair | None:
        """Prompt ids up to the last response, and that response as text; None where it was cut off."""
        return self._binding.generation_pair(index)

    def generation_pairs(self, limit: int) -> list[GenerationPair]:
        """The first ``limit`` pairs."""
        return collect_pairs(self, limit)


class ChatDataset:
    """Conversations, of which the assistant's turns are learnt, their end-of-turn tokens included.

    Args:
        path: a file, a folder or rows in memory: messages (OpenAI, ShareGPT), pairs (Alpaca and the like: a question
            and an answer), or plain text that ``turn_separator`` splits (``shapes.conversation_rows``).
        tokenizer: a fast tokenizer; None takes the model's when the tuner binds the dataset. Its chat template writes
            the conversation, else ``turns.PLAIN_TURNS``.
        turn_separator: what stands between the turns of a plain text; they alternate, the user's first.
        response_loss_only: False learns every token (None: as configured, else True). A row without an assistant turn
            is left out and named, unless every token is learnt.
        max_turns: keep the system message and this many turns (messages) at the end; drops are counted.
        max_seq_length: as in ``TaskDataset``.

    What is None is taken from the configuration.

    Raises:
        LLMBuilderError: what ``read_rows`` raises; when tokenised, no example left.
    """

    task_type = "conversation"
    metric = TASKS["conversation"].metric

    def __init__(
        self,
        path: Data,
        tokenizer: Tokenizer | None = None,
        *,
        turn_separator: str | None = None,
        response_loss_only: bool | None = None,
        max_turns: int | None = None,
        max_seq_length: int | None = None,
    ) -> None:
        if max_turns is not None and max_turns < 1:
            raise ConfigError(f"max_turns must be at least 1, got {max_turns}")
        reading = read_rows(path)
        settings = Settings(self.task_type, max_seq_length, turn_separator, response_loss_only, max_turns)
        self._binding = Binding(RequestBuilder(reading.rows), reading.report, tokenizer, settings)

    def bind(self, tokenizer: Tokenizer, config: Any) -> None:
        """Tokenise with this tokenizer and the settings of ``config`` that the dataset wasn't given; idempotent."""
        self._binding.bind(tokenizer, config)

    @property
    def report(self) -> DataReport:
        """Rows read and, once bound, what became of them."""
        return self._binding.report

    def __len__(self) -> int:
        return len(self._binding.examples())

    def __getitem__(self, index: int) -> Example:
        return self._binding.examples()[index]

    def generation_pair(self, index: int) -> GenerationPair | None:
        """Prompt ids up to the last assistant turn, and that turn as text; None where it was cut off."""
        return self._binding.generation_pair(index)

    def generation_pairs(self, limit: int) -> list[GenerationPair]:
        """The first ``limit`` pairs."""
        return collect_pairs(self, limit)
