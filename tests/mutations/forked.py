"""Runs tests against a copy of the package in a child by fork, for imports take longer than tests."""

import json
import os
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def first_failure(tree: Path, tests: Path, which: str, anew: tuple[str, ...] = ()) -> tuple[str, str]:
    """The name of the first test that fails and its report; two empty strings when all pass.

    Args:
        tree: what the package is imported from.
        tests: their file.
        which: of its tests, as pytest -k has it.
        anew: packages that differ from call to call; the parent may have imported those and what does not import them.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        sys.dont_write_bytecode = True  # a file that changes twice in a second would be taken for its old self
        sys.path.insert(0, str(tree))
        for name in [name for name in sys.modules if name.startswith(anew)]:
            del sys.modules[name]
        tempfile.tempdir = str(tree)
        failure = Failure()
        with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
            options = ["-x", "-q", "-p", "no:cacheprovider", "-k", which, f"--rootdir={ROOT}"]
            code = pytest.main([*options, str(tests)], plugins=[failure])
        with open(writer, "w", encoding="utf-8") as pipe:
            json.dump([int(code), *failure.said], pipe)
        os._exit(0)
    os.close(writer)
    with open(reader, encoding="utf-8") as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    code, name, report = json.loads(said) if said else (-1, "", "its process died")
    if code not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        raise SystemExit(f"{tests} -k '{which}' did not run: {report or code}")
    return name, report


class Failure:
    """A plugin that notes the first failure."""

    said = ("", "")

    def pytest_runtest_logreport(self, report):
        if report.failed and not self.said[0]:
            self.said = (report.nodeid.split("::")[-1], report.longreprtext)
