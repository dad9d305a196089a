"""The operators: one public function each, with its gradient formula; `_backend` chooses who computes it."""

from .cross_entropy import linear_cross_entropy
from .dropout import dropout, dropout_mask
from .ewc import ewc_accumulate_, ewc_penalty, ewc_penalty_
from .lora import frozen_linear, lora_delta, lora_linear

__all__ = [
    "dropout",
    "dropout_mask",
    "ewc_accumulate_",
    "ewc_penalty",
    "ewc_penalty_",
    "frozen_linear",
    "linear_cross_entropy",
    "lora_delta",
    "lora_linear",
]
