"""Errors for people: what is wrong, where, and what to do."""

import difflib
from collections.abc import Iterable


class LLMBuilderError(Exception):
    """Bad input or an impossible request. The command line prints its text as one line and exits with 1."""


class ConfigError(LLMBuilderError, ValueError):
    """A setting that is unknown, malformed or contradicts another."""


class UnknownNameError(ConfigError):
    """A name that no setting has, or none yet. The command line exits with 2."""


class UsageError(ConfigError):
    """A command line that cannot be meant: a flag that names nothing, or two that say two things. Exit status 2."""


def nearest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the known name most like ``name``, or nothing when none is like it."""
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def no_such_task(where: str, task: str, known: Iterable[str]) -> str:
    """What to say of a task that is none of the known ones; ``where`` it was named."""
    known = list(known)
    return f"{where}: no task is called '{task}'{nearest(task, known) or '.'} There are: {known}"
