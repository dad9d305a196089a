"""`python -m llmbuilder` is `llmbuilder`."""

import sys

from .cli import main

sys.exit(main())
