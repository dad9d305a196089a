"""Settings, one row each. The other methods."""

from pydantic import BaseModel


class MethodRows(BaseModel):
    """The other methods."""

    def contradictions(self) -> dict[str, bool]:
        """What is wrong, said for people, and whether it is so."""
        return {}
