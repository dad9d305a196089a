"""What every test relies on."""

import atexit
import os
import shutil
import tempfile

# Child processes must import what the tests import, not the source tree that they happen to be started in: by default
# `python -c` and multiprocessing's servers put the working directory first.
os.environ["PYTHONSAFEPATH"] = "1"

# Text that models make is kept in a folder of this run alone.
os.environ["LLMBUILDER_CACHE"] = tempfile.mkdtemp()
atexit.register(shutil.rmtree, os.environ["LLMBUILDER_CACHE"], ignore_errors=True)
