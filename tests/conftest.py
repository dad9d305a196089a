"""What every test relies on."""

import os

# Child processes must import what the tests import, not the source tree that they happen to be started in: by default
# `python -c` and multiprocessing's servers put the working directory first.
os.environ["PYTHONSAFEPATH"] = "1"
