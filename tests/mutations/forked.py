"""Seeds bugs into a copy of the package and runs tests against it in a child by fork, for imports are the slow part."""

import argparse
import json
import os
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]


def try_bugs(
    description: str,
    bugs: Sequence[Any],
    source: Path,
    copied: str,
    copy_tree: Callable[[Path], Path],
    run_tests: Callable[[Path, str, str], str],
    write: Callable[[list[Any], list[str]], None],
) -> int:
    """The whole of a suite's program: what it exits with.

    Args:
        description: of the program; its first line is shown.
        bugs: those there are, each with kind, name, file, right, wrong, tests and which.
        source: the folder that the bugs' files lie in.
        copied: its copy in the tree.
        copy_tree: makes a tree, in an empty folder.
        run_tests: on a tree, of a file of tests some; says what the first failure is, nothing when all pass.
        write: writes the table; of a run of all bugs alone.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("names", nargs="*", help="only bugs whose names contain one of these")
    names = parser.parse_args().names
    bugs = [bug for bug in bugs if not names or any(name in bug.name for name in names)]
    for bug in bugs:
        replaced(source, bug)  # a stale one ends the run at once
    with tempfile.TemporaryDirectory() as folder:
        tree = copy_tree(Path(folder))
        for tests in sorted({bug.tests for bug in bugs}):
            which = " or ".join(sorted({bug.which for bug in bugs if bug.tests == tests}))
            if said := run_tests(tree, tests, which):
                print(f"{tests} -k '{which}' fails without any seeded bug: {said}")
                return 1
        found = []
        for bug in bugs:
            path = tree / copied / bug.file
            right = path.read_text()
            path.write_text(replaced(source, bug))
            found.append(run_tests(tree, bug.tests, bug.which))
            path.write_text(right)
            print(f"{bug.kind}: {bug.name}: {found[-1] or 'NOT SEEN'}", flush=True)
    if not names:
        write(bugs, found)
    missed = [bug.name for bug, said in zip(bugs, found, strict=True) if not said]
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(bug.kind for bug in bugs).items())
    print(f"{len(bugs) - len(missed)} of {len(bugs)} seen ({kinds})" + "".join(f"\n  missed: {n}" for n in missed))
    return 1 if missed else 0


def replaced(source: Path, bug: Any) -> str:
    """The text of the bug's file with the bug in it."""
    text = (source / bug.file).read_text()
    if text.count(bug.right) != 1:
        raise SystemExit(f"{bug.file}: stands {text.count(bug.right)} times there, not once: {bug.right}")
    return text.replace(bug.right, bug.wrong)


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
