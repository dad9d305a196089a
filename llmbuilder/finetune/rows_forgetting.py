"""Settings, one row each. Against forgetting: EWC, L2-SP, replay, the base task."""

from pydantic import BaseModel


class ForgettingRows(BaseModel):
    """Against forgetting: EWC, L2-SP, replay, the base task."""

    def contradictions(self) -> dict[str, bool]:
        """What is wrong, said for people, and whether it is so."""
        return {}
