"""Where a run is."""

import math
from dataclasses import dataclass


@dataclass
class Progress:
    """Where a run is, at the end of an optimizer step."""

    step: int = 0
    epoch: int = 0
    batches: int = 0
    """Batches of this epoch that are used up."""
    seconds: float = 0.0
    base_loss: float = math.nan
    last_loss: float = math.nan
    """Of the last evaluation."""
    best_loss: float = math.inf
    best_step: int = 0
    worse: int = 0
    """Evaluations since the best one."""
