"""The prompt of a conversation."""

from collections.abc import Sequence

import jinja2
from transformers import PreTrainedTokenizerFast

from ..errors import LLMBuilderError, nearest
from ..turns import PLAIN_TURNS, plain_turn


def chat_prompt(tokenizer: PreTrainedTokenizerFast, messages: Sequence[dict[str, str]]) -> list[int]:
    """Token ids of a conversation, up to where the assistant's next answer begins.

    Args:
        tokenizer: its chat template is used if it has one; otherwise the turns are written as ``PLAIN_TURNS`` says, the
            end-of-text token behind each answer, and the prompt ends in ``Assistant:``.
        messages: ``{"role": "system" | "user" | "assistant" | "tool", "content": text}`` in order.

    Raises:
        LLMBuilderError: an unknown role, or a conversation that the template refuses.
    """
    if tokenizer.chat_template:
        try:
            text = tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=True)
        except jinja2.TemplateError as error:
            raise LLMBuilderError(f"the model's chat template refuses the conversation: {error}") from error
        return list(tokenizer(text, add_special_tokens=False)["input_ids"])
    text = "".join(_plain_turn(message, tokenizer.eos_token or "") for message in messages)
    return list(tokenizer(text + PLAIN_TURNS["assistant"].before)["input_ids"])


def _plain_turn(message: dict[str, str], end: str) -> str:
    role = message["role"]
    if role not in PLAIN_TURNS:
        raise LLMBuilderError(
            f"no role '{role}' in a conversation, only {', '.join(PLAIN_TURNS)}{nearest(role, PLAIN_TURNS)}"
        )
    return "".join(plain_turn(role, message["content"], end))
