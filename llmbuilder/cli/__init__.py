"""The command line: finds the command, reads its flags, turns errors into one line and an exit status.

Each command is a module of this package with `USAGE`, `arguments(parser)` and `run(args) -> int`. It is imported when
it is asked for, and imports torch when it has checked what it was given.

Exit status: 0 done, 1 bad input, 2 unknown command, flag or setting, or flags that cannot be meant, 130 interrupted.
"""

import importlib
import os
import re
import shlex
import sys
import traceback
import warnings
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Sequence
from typing import Any

from .._version import __version__
from ..errors import UnknownNameError, UsageError, nearest

COMMANDS = {
    "finetune model": "fine-tune a model on a data set",
    "chat": "talk with a model",
    "generate": "continue a prompt",
    "evaluate": "loss, perplexity, BLEU and accuracy of a model on a data set",
    "merge": "write a model with its adapter merged into the weights",
    "doctor": "say what this machine offers, and check every operator on it",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in words or bool(os.environ.get("LLMBUILDER_DEBUG"))
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _say_warning
            return _dispatch(words)
    except SystemExit as stop:  # argparse, after --help or with its own complaint
        return int(stop.code or 0)
    except KeyboardInterrupt:
        print(_interrupted(words), file=sys.stderr)
        return 130
    except Exception as error:
        if debug:
            traceback.print_exc()
        else:
            print(f"llmbuilder: {_one_line(error)}", file=sys.stderr)
        return 2 if isinstance(error, UnknownNameError | UsageError) else 1


def _dispatch(words: list[str]) -> int:
    if words[:1] == ["--version"]:
        print(f"llmbuilder {__version__}")
        return 0
    command = next((name for name in COMMANDS if words[: len(name.split())] == name.split()), None)
    if command is None:
        return _no_command(words)
    module = importlib.import_module(f".{command.split()[0]}", __name__)
    parser = ArgumentParser(
        prog=f"llmbuilder {command}",
        usage=f"llmbuilder {command} {module.USAGE}",
        description=module.__doc__,
        allow_abbrev=False,
    )
    module.arguments(parser)
    parser.add_argument("--debug", action="store_true", help="show where an error arose")
    rest = words[len(command.split()) :]
    _check_flags(rest, parser)
    args = parser.parse_args(rest)
    _check_places(args, parser)
    if command == "finetune model":  # a part of it is training
        return int(module.run(args))
    from ..finetune.interrupt import interruptible

    with interruptible():
        return int(module.run(args))


def _no_command(words: list[str]) -> int:
    """Help for whoever asks for it; for a word that is no command, the nearest one."""
    lines = [f"  {name:<16}{effect}" for name, effect in COMMANDS.items()]
    usage = "\n".join(
        ["usage: llmbuilder COMMAND [flags]   (COMMAND --help lists its flags)", "", *lines, "  --version"]
    )
    asked = [word for word in words if word in ("-h", "--help")]
    if asked or not words or words == ["finetune"]:
        print(usage, file=sys.stdout if asked else sys.stderr)
        return 0 if asked else 2
    said = " ".join(words[:2] if words[0] == "finetune" else words[:1])
    raise UnknownNameError(f"unknown command '{said}'{nearest(said, COMMANDS)} (llmbuilder --help lists all)")


def _check_flags(words: list[str], parser: ArgumentParser) -> None:
    """Check the flags themselves, before argparse asks for those that are missing.

    Raises UnknownNameError for one that the command has not, UsageError where one setting is given twice in two words,
    or as two lists. The same flag again overrules itself, as it does everywhere.
    """
    known = parser._option_string_actions
    seen: dict[str, str] = {}
    for word in words:
        flag = word.split("=", 1)[0]
        if flag == "--":
            return
        if not re.match(r"--[a-z]", flag):
            continue
        if flag not in known:
            raise UnknownNameError(_unknown_flag(flag, known))
        action = known[flag]
        before = seen.get(action.dest)
        if before == flag and action.nargs == "+":
            raise UsageError(f"{flag} is given twice: give all in one, {flag} A B")
        if before not in (None, flag):
            raise UsageError(f"{before} and {flag} say two things of one setting: give one of them")
        seen[action.dest] = flag


def _unknown_flag(flag: str, known: Iterable[str]) -> str:
    from ..finetune.config import NOT_YET, not_yet

    setting = flag.removeprefix("--").removeprefix("no-").replace("-", "_")
    return not_yet(setting) if setting in NOT_YET else f"unknown flag '{flag}'{nearest(flag, known)}"


def _check_places(args: Namespace, parser: ArgumentParser) -> None:
    """Raise UsageError for a path or a name that is empty, as a shell's unset variable leaves it."""
    for action in parser._actions:
        if action.metavar in ("path", "folder", "name") and getattr(args, action.dest) == "":
            otherwise = "" if action.required else ", or leave the flag out"
            raise UsageError(f"{action.option_strings[0]} is empty: give a {action.metavar}{otherwise}")


def _one_line(error: Exception) -> str:
    """What, where and what to do; for an error that nobody foresaw, also its kind and how to see where it arose."""
    from ..errors import LLMBuilderError

    text = " ".join(str(error).split())
    if isinstance(error, LLMBuilderError | OSError):
        return text
    return f"{type(error).__name__}: {text} (unexpected; --debug shows where it arose)"


def _say_warning(message: Warning | str, *_: Any, **__: Any) -> None:
    """A warning for people: its text, without the line of code that gave it."""
    print(f"llmbuilder: warning: {' '.join(str(message).split())}", file=sys.stderr)


def _interrupted(words: list[str]) -> str:
    if words[:2] != ["finetune", "model"]:
        return "llmbuilder: interrupted"
    again = [word for word in words if word not in ("--resume", "--overwrite")]
    return f"llmbuilder: interrupted; go on from the last checkpoint: {shlex.join(['llmbuilder', *again, '--resume'])}"
