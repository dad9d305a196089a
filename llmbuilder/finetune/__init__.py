"""Fine-tuning: the settings, the one loop, and what a run leaves behind.

Names are imported on first use: the command line reads the settings without loading torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..nn import LoRAConfig
    from .config import FineTuningConfig
    from .results import EvalResults, Results
    from .tuner import FineTuner, finetune_model

__all__ = ["EvalResults", "FineTuner", "FineTuningConfig", "LoRAConfig", "Results", "finetune_model"]

_HOME = {
    "EvalResults": ".results",
    "FineTuner": ".tuner",
    "FineTuningConfig": ".config",
    "LoRAConfig": "..nn",
    "Results": ".results",
    "finetune_model": ".tuner",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module 'llmbuilder.finetune' has no attribute '{name}'")
