"""Say what this machine offers, who computes each operator on it and why nobody faster does, and check every one."""

from argparse import ArgumentParser, Namespace

USAGE = ""


def arguments(parser: ArgumentParser) -> None:
    """It takes none."""


def run(args: Namespace) -> int:
    """Print the report; 1 when an operator is wrong."""
    from ..doctor import report

    text, passed = report()
    print(text)
    return 0 if passed else 1
