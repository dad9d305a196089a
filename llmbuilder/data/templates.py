"""Prompt templates: how requests and conversations become text, and which characters of it are learnt.

A request is one user message where the tokenizer has a chat template; else the plain prompt stands before the response,
and the tokenizer's end-of-text token behind it. ``{request}`` and ``{context}`` are the columns of the row
(``shapes.PAIR_COLUMNS``); what stands in brackets is left out where there is no context.

A conversation without a chat template is written as ``llmbuilder.turns`` says.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple

import jinja2

from ..errors import LLMBuilderError
from ..turns import plain_turn
from .examples import Tokenizer, special_ids
from .shapes import Message, Pair, RowError

DAY = datetime(2024, 7, 26)
"""The date of all rendered text, for templates that write today's: the same rows are the same data tomorrow. Llama 3's
template has this one where it knows none."""

# transformers hands no function of ours to a template: a macro in front of it takes the place of its own.
_FIXED_DATE = (
    "{% macro strftime_now(format) %}{{ format"
    + "".join(f"|replace('%{code}', '{DAY.strftime('%' + code)}')" for code in (*"aAbBdHIjmMpSuwyY", "-d", "-m"))
    + " }}{% endmacro %}"
)


@dataclass(frozen=True)
class Task:
    """User message for a chat template, prompt and what stands before the response without one, metric of accuracy."""

    message: str
    prompt: str
    joint: str
    metric: str


TASKS = {
    "instruction": Task(
        message="{request}[\n\n{context}]",
        prompt="### Instruction:\n{request}\n\n[### Input:\n{context}\n\n]### Response:\n",
        joint="",
        metric="next_token",
    ),
    "question_answering": Task(
        message="[{context}\n\n]{request}",
        prompt="[Context: {context}\n]Question: {request}\nAnswer:",
        joint=" ",
        metric="exact_match",
    ),
    "summarization": Task(
        message="Summarize the following text.\n\n{request}",
        prompt="### Text:\n{request}\n\n### Summary:\n",
        joint="",
        metric="next_token",
    ),
    "code": Task(
        message="{request}[\n\n{context}]",
        prompt="### Task:\n{request}\n\n[### Input:\n{context}\n\n]### Code:\n",
        joint="",
        metric="next_token",
    ),
    "conversation": Task(message="{request}[\n\n{context}]", prompt="", joint="", metric="next_token"),
}


@dataclass(frozen=True)
class Rendered:
    """Text, the spans of characters that are learnt, where the last response begins (0: there is none), its content."""

    text: str
    spans: list[tuple[int, int]]
    response_start: int = 0
    reference: str = ""


def fill(template: str, pair: Pair) -> str:
    """The template with the pair's request and context; the bracketed part only where there is a context."""
    if "[" in template:
        before, rest = template.split("[", 1)
        optional, after = rest.split("]", 1)
        template = before + (optional if pair.context else "") + after
    # not str.format: what stands in the columns may hold braces, and one column may quote the other's name
    pieces = template.replace("{context}", "\0c\0").replace("{request}", "\0r\0").split("\0")
    return "".join({"c": pair.context, "r": pair.request}.get(piece, piece) for piece in pieces)


class Writer:
    """Writes pairs and conversations the way that the model of this tokenizer knows them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._chat = ChatTemplate(tokenizer) if getattr(tokenizer, "chat_template", None) else None
        self._end = tokenizer.eos_token or ""
        self.adds_special_tokens = self._chat is None
        """Whether the tokenizer is to add its own (a begin-of-text token, say); a chat template has written them."""

    def describe(self) -> str:
        """A sentence for the report."""
        if self._chat:
            return "Prompts by the tokenizer's chat template"
        ending = (
            f"answers end in '{self._end}'" if self._end else "the tokenizer has no end-of-text token to end answers"
        )
        return f"Prompts by the plain template, as the tokenizer has no chat template; {ending}"

    def pair(self, pair: Pair, task: Task) -> Rendered:
        """A request in the task's prompt, and its response."""
        if self._chat or not task.prompt:
            return self.conversation(pair_messages(pair, task))
        system = f"{pair.system}\n\n" if pair.system else ""
        prompt = system + fill(task.prompt, pair)
        text = prompt + task.joint + pair.response + self._end
        return Rendered(text, [(len(prompt), len(text))], len(prompt), pair.response)

    def conversation(self, messages: list[Message]) -> Rendered:
        """The turns in the chat template, or in plain turns."""
        return self._chat.render(messages) if self._chat else plain_conversation(messages, self._end)


def pair_messages(pair: Pair, task: Task) -> list[Message]:
    """The pair as a conversation of one question and one answer."""
    messages = [{"role": "user", "content": fill(task.message, pair)}, {"role": "assistant", "content": pair.response}]
    return [{"role": "system", "content": pair.system}, *messages] if pair.system else messages


def plain_conversation(messages: list[Message], end: str) -> Rendered:
    """The conversation in plain turns; each answer, the space before it and the end token are learnt."""
    text, spans, reference = "", [], ""
    for message in messages:
        turn = plain_turn(message["role"], message["content"], end)
        if message["role"] == "assistant":
            reference, start = message["content"], len(text) + len(turn.before)
            spans.append((start, start + len(turn.said)))
        text += "".join(turn)
    return Rendered(text, spans, spans[-1][0] if spans else 0, reference)


class Frame(NamedTuple):
    """What stands before a first question, between it and the answer, and what ends an answer."""

    before: str
    between: str
    behind: str


class ChatTemplate:
    """A tokenizer's chat template, with the places of the answers in what it renders.

    Templates mark no answers, so an answer's start is found from the prefix: the conversation before it, rendered with
    the generation prompt. Its end is that of the end-of-turn token, the first special one which the template writes
    behind an answer (of all that it writes there, where no special token is among it).
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        user = {"role": "user", "content": "\x02"}
        try:
            asked = self._render([user], prompt=True)
            answered = self._render([user, {"role": "assistant", "content": "\x03"}])
        except RowError as error:
            raise LLMBuilderError(f"the tokenizer's chat template cannot render a conversation: {error}") from error
        if "\x03" not in answered:
            raise LLMBuilderError("the tokenizer's chat template does not show what the assistant says")
        self._opening = asked.removeprefix(self._render([user]))
        before, _, between = asked.partition("\x02")
        self.frame = Frame(before, between, self._end_of_turn(answered.rsplit("\x03", 1)[1]))

    def prompt(self, messages: list[Message]) -> str:
        """The conversation up to where the assistant's next answer begins. Raises RowError where it is refused."""
        return self._render(messages, prompt=True)

    def render(self, messages: list[Message]) -> Rendered:
        """The conversation as the template writes it, and its answers as spans.

        Raises:
            RowError: the template refuses the conversation, or does not show an answer as it was given.
        """
        text = self._render(messages)
        spans = []
        for index, message in enumerate(messages):
            if message["role"] == "assistant":
                start = self._start(text, messages[:index], index)
                spans.append((start, self._end(text, start, message["content"], index)))
        last = next((m["content"] for m in reversed(messages) if m["role"] == "assistant"), "")
        return Rendered(text, spans, spans[-1][0] if spans else 0, last)

    def _start(self, text: str, before: list[Message], index: int) -> int:
        if any(message["role"] != "system" for message in before):
            prefix = self._render(before, prompt=True)
            if text.startswith(prefix):
                return len(prefix)
        elif self._opening and self._opening in text:  # the first turn; a system prompt may stand before it
            return text.index(self._opening) + len(self._opening)
        raise RowError(f"the chat template writes turn {index + 1} differently when the conversation goes on")

    def _end(self, text: str, start: int, content: str, index: int) -> int:
        stripped = content.strip()  # many templates strip
        found = text.find(stripped, start)
        if found < 0:
            raise RowError(f"the chat template does not show turn {index + 1} as it was given")
        lead = len(content) - len(content.lstrip()) if stripped else 0
        verbatim = text.startswith(content, max(found - lead, start))
        end = max(found - lead, start) + len(content) if verbatim else found + len(stripped)
        return end + len(self.frame.behind) if text.startswith(self.frame.behind, end) else end

    def _end_of_turn(self, closing: str) -> str:
        special = self._tokenizer.convert_ids_to_tokens(sorted(special_ids(self._tokenizer)))
        # the first: behind it a template may end the whole conversation, once, as Phi-3's does
        ends = [(closing.find(token), -len(token)) for token in special if token in closing]
        start, length = min(ends, default=(0, -len(closing)))
        return closing[: start - length]

    def _render(self, messages: list[Message], prompt: bool = False) -> str:
        if not messages:
            return ""
        template = self._tokenizer.get_chat_template()
        try:
            rendered: Any = self._tokenizer.apply_chat_template(
                messages,
                chat_template=(_FIXED_DATE if "strftime_now" in template else "") + template,
                tokenize=False,
                add_generation_prompt=prompt,
            )
        except (jinja2.TemplateError, TypeError, ValueError) as error:
            raise RowError(f"the chat template refuses it: {error}") from error
        return str(rendered)
