"""Fine-tune language models with fused LoRA, dropout and EWC kernels.

    import llmbuilder as lb

    model = lb.load_model("path/to/model")
    results = lb.finetune_model(model, dataset, config)

Names are imported on first use, so that the command line answers `--help` without loading torch.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from .data import MultiTaskDataset
    from .finetune import FineTuner, FineTuningConfig, finetune_model
    from .models import load_model, save_model
    from .nn import LoRAConfig

__all__ = [
    "FineTuner",
    "FineTuningConfig",
    "LoRAConfig",
    "MultiTaskDataset",
    "__version__",
    "finetune_model",
    "load_model",
    "save_model",
]

_HOME = {
    "FineTuner": ".finetune",
    "FineTuningConfig": ".finetune",
    "finetune_model": ".finetune",
    "LoRAConfig": ".nn",
    "MultiTaskDataset": ".data",
    "load_model": ".models",
    "save_model": ".models",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(_HOME[name], __name__), name)
    raise AttributeError(f"module 'llmbuilder' has no attribute '{name}'")
