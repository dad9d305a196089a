"""What the interpreter raises."""


class PtxError(RuntimeError):
    """Something that a GPU would refuse, that is undefined there, or that the interpreter does not model."""
