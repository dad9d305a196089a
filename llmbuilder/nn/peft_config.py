"""``adapter_config.json``, which PEFT writes beside an adapter: read, and refused where it asks for what is missing."""

import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..errors import LLMBuilderError

CONFIG = "adapter_config.json"
# Keys of adapter_config.json that are obeyed, or say nothing about what the adapter computes. Any other is refused.
KNOWN_KEYS = {
    *(
        "peft_type",
        "peft_version",
        "task_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "runtime_config",
    ),
    *("inference_mode", "init_lora_weights", "eva_config", "corda_config", "loftq_config", "lora_ga_config"),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "fan_in_fan_out", "megatron_core"),
    *("r", "rank_pattern", "lora_alpha", "alpha_pattern", "use_rslora", "lora_dropout", "qalora_group_size"),
    *("bias", "modules_to_save", "trainable_token_indices"),
}
# Ways to start an adapter that leave the base as it is; the others (PiSSA, OLoRA …) change it.
HARMLESS_STARTS = (True, False, "gaussian", "orthogonal", "eva")
# PEFT's rule for the keys of patterns: one fits the end of a layer's path.
_PATTERN = r"(.*\.)?({})"


def _is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


def _is_pattern(key: str) -> bool:
    try:
        re.compile(_PATTERN.format(key))
    except re.error:
        return False
    return True


def _are_tokens(value: Any) -> bool:
    return isinstance(value, list) and all(type(index) is int and index >= 0 for index in value)


def _are_patterns(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_is_pattern, value)) and all(map(_is_positive, value.values()))


# What the values of the keys that are obeyed should be; the others than r and lora_alpha may be missing or null.
SHAPES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "r": ("a positive number", _is_positive),
    "lora_alpha": ("a positive number", _is_positive),
    "rank_pattern": ("a mapping of regular expressions to positive numbers", _are_patterns),
    "alpha_pattern": ("a mapping of regular expressions to positive numbers", _are_patterns),
    "lora_dropout": (
        "0, or a positive number below 1",
        lambda value: value == 0 or (_is_positive(value) and value < 1),
    ),
    "use_rslora": ("true or false", lambda value: isinstance(value, bool)),
    "bias": ("none, all or lora_only", lambda value: value in ("none", "all", "lora_only")),
    "modules_to_save": (
        "a list of names",
        lambda value: isinstance(value, list) and all(isinstance(name, str) and name for name in value),
    ),
    "trainable_token_indices": (
        "a list of token ids, or one for each layer",
        lambda value: all(map(_are_tokens, value.values() if isinstance(value, dict) else [value])),
    ),
}


def read_config(folder: Path) -> dict[str, Any]:
    """What the file says, its values checked. Raises LLMBuilderError that names the file and the key."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise LLMBuilderError(f"{folder} holds no adapter: {CONFIG} can't be read ({error.strerror})") from None
    except ValueError as error:
        raise LLMBuilderError(f"{path} is no valid JSON ({error})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else None
        raise LLMBuilderError(f"{path}: peft_type is {kind!r}; only LORA adapters can be read")
    unknown = [key for key, value in config.items() if value and key not in KNOWN_KEYS]
    if unknown:
        raise LLMBuilderError(f"{path}: {', '.join(unknown)} is not yet available")
    start = config.get("init_lora_weights", True)
    if start not in HARMLESS_STARTS:
        raise LLMBuilderError(
            f"{path}: init_lora_weights='{start}' changes the base's weights, and is not yet available"
        )
    for key, (wanted, fits) in SHAPES.items():
        needed = key in ("r", "lora_alpha")
        if (needed or config.get(key) is not None) and not fits(config.get(key)):
            raise LLMBuilderError(f"{path}: {key} should be {wanted}, and is {config.get(key)!r}")
    return config


def token_indices(config: Mapping[str, Any], folder: Path) -> list[int]:
    """The tokens whose rows train: PEFT's list, or its lists by layer where they are equal."""
    given = config.get("trainable_token_indices") or []
    lists = list(given.values()) if isinstance(given, dict) else [given]
    if any(indices != lists[0] for indices in lists):
        raise LLMBuilderError(f"{folder / CONFIG}: trainable_token_indices that differ by layer are not yet available")
    return list(lists[0])


def by_pattern(patterns: Mapping[str, float] | None, path: str, default: float) -> float:
    """The value of the first key that fits the end of the path."""
    return next((v for key, v in (patterns or {}).items() if re.fullmatch(_PATTERN.format(key), path)), default)
