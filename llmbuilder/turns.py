"""How a conversation is written for a model without a chat template: to train on it, and to ask the model."""

from typing import NamedTuple


class Turn(NamedTuple):
    """What stands before the content of a message, what is said, and what stands behind."""

    before: str
    said: str
    behind: str


PLAIN_TURNS = {
    "system": Turn("", "{content}", "\n\n"),
    "user": Turn("User: ", "{content}", "\n"),
    "tool": Turn("Tool: ", "{content}", "\n"),
    "assistant": Turn("Assistant:", " {content}{end}", "\n"),
}


def plain_turn(role: str, content: str, end: str) -> Turn:
    """A message of one of the roles of ``PLAIN_TURNS``; ``end`` is the tokenizer's end-of-text token."""
    before, said, behind = PLAIN_TURNS[role]
    return Turn(before, said.format(content=content, end=end), behind)
