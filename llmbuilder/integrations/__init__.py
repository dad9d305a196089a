"""Thin doors to other training stacks. Each module is imported by whoever uses it, none by the rest of the package."""
