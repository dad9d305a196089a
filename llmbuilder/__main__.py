"""`python -m llmbuilder` is `llmbuilder`."""

from .cli import main

main()
