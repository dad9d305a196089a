"""Every setting of a fine-tuning run, one row each.

The rows make the validation, the flags of `llmbuilder finetune model`, docs/settings.md and the refusals of what is not
available yet. A setting has one name in Python, in YAML and (with dashes) on the command line.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, NoReturn, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError, field_validator, model_validator

from ..errors import ConfigError, UnknownNameError, nearest
from .rows import RunRows, Targets
from .rows_forgetting import ForgettingRows
from .rows_methods import MethodRows
from .yaml_text import load_yaml

if TYPE_CHECKING:
    from ..nn import LoRAConfig


class FineTuningConfig(MethodRows, ForgettingRows, RunRows):
    """One validated, immutable set of settings; docs/settings.md lists them all.

    Raises ConfigError (a ValueError) that names the setting, what is wrong with it and what to do; for a name that does
    not exist, UnknownNameError with the nearest one. After validation ``use_lora`` is a bool and the ``lora_*``
    settings hold what was given in any spelling.
    """

    def __init__(self, **settings: Any) -> None:
        try:
            super().__init__(**settings)
        except ValidationError as error:
            _raise(error, settings)

    @model_validator(mode="before")
    @classmethod
    def _settle(cls, settings: dict[str, Any]) -> dict[str, Any]:
        settings = ForgettingRows.implied(MethodRows.implied(settle_names(settings)))
        if settings.get("use_lora") is None:
            settings["use_lora"] = any(settings.get(name) is not None for name in LORA_SETTINGS)
        return settings

    @field_validator("lora_target_modules")
    @classmethod
    def _all_is_all_linear(cls, targets: Targets | None) -> Targets | None:
        if targets is not None and not targets:
            raise ValueError("should name at least one module")
        return "all" if targets in ("all-linear", ["all-linear"], ["all"]) else targets

    @field_validator("output_dir", mode="before")
    @classmethod
    def _no_nameless_folder(cls, path: Any) -> Any:
        if path == "":  # Path("") is the folder that one stands in
            raise ValueError("should name a folder")
        return path

    @field_validator("*", mode="before")
    @classmethod
    def _bool_is_no_number(cls, value: Any, info: Any) -> Any:
        if isinstance(value, bool) and bool not in types(cls.model_fields[info.field_name].annotation):
            raise ValueError("should not be true or false")
        return value

    @model_validator(mode="after")
    def _fit_together(self) -> "FineTuningConfig":
        if self.lora_config is not None:
            try:
                self.lora()  # LoRAConfig checks the fields that have no row here
            except ConfigError as error:
                raise type(error)(f"lora_config: {str(error).removeprefix('LoRAConfig: ')}") from None
        given = [name for name in LORA_SETTINGS if getattr(self, name) is not None]
        contradictions = {
            f"use_lora=False contradicts {', '.join(given)}: drop one of them": not self.use_lora and given,
            "warmup_steps and warmup_ratio both set the warm-up: give one": (
                self.warmup_steps is not None and self.warmup_ratio is not None
            ),
            "min_lr_ratio has no effect with scheduler='constant': drop one of them": (
                self.scheduler == "constant" and self.min_lr_ratio > 0
            ),
            "early_stopping_patience counts evaluations, and eval_every=None has none before the end: set eval_every": (
                self.early_stopping_patience is not None and self.eval_every is None
            ),
            f"dialogue_format=True contradicts task_type='{self.task_type}': drop one of them": (
                self.dialogue_format and self.task_type not in (None, "conversation")
            ),
            "turn_separator and max_turns need dialogue_format=True": (
                not (self.dialogue_format or self.task_type == "conversation")
                and (self.turn_separator is not None or self.max_turns is not None)
            ),
        }
        contradictions |= ForgettingRows.contradictions(self) | MethodRows.contradictions(self)
        for message, wrong in contradictions.items():
            if wrong:
                raise ValueError(message)
        return self

    def lora(self) -> "LoRAConfig | None":
        """The adapters' settings, every spelling united; None for full fine-tuning."""
        if not self.use_lora:
            return None
        from ..nn import LoRAConfig

        dropout = self.lora_dropout if self.lora_dropout is not None else self.dropout_rate
        settled = {
            "rank": self.lora_rank,
            "alpha": self.lora_alpha,
            "dropout": dropout,
            "target_modules": self.lora_target_modules,
        }
        return LoRAConfig(
            **(self.lora_config or {}) | {field: value for field, value in settled.items() if value is not None}
        )

    def resolved(self) -> dict[str, Any]:
        """Every setting as plain values, defaults and LoRA settings filled in: what config.yaml holds."""
        values = self.model_dump(mode="json", exclude={"lora_config", "target_modules"})
        lora = self.lora()
        values["lora_config"] = None if lora is None else lora.model_dump(mode="json")
        for field in LORA_FIELDS if lora is not None else ():
            values[f"lora_{field}"] = values["lora_config"][field]
        return values

    def changes(self, other: "FineTuningConfig") -> list[str]:
        """`name: mine -> other's` for every setting that a resumed run may not change and that differs."""
        mine, others = self.resolved(), other.resolved()
        return [
            f"{name}: {mine[name]!r} -> {others[name]!r}"
            for name in mine
            if _extra(name)["changes_weights"] and mine[name] != others[name]
        ]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FineTuningConfig) and self.resolved() == other.resolved()

    @classmethod
    def from_yaml(cls, path: str | Path) -> "FineTuningConfig":
        """The settings of a YAML file. Raises ConfigError that names the file."""
        settings = read_settings(path)
        try:
            return cls(**settings)
        except ConfigError as error:
            raise type(error)(f"{path}: {error}") from None

    def to_yaml(self) -> str:
        """`resolved()` as YAML text; `from_yaml` reads an equal config from it."""
        import yaml

        return yaml.safe_dump(self.resolved(), sort_keys=False, allow_unicode=True)


LORA_FIELDS = ("rank", "alpha", "dropout", "target_modules")
LORA_SETTINGS = ("lora_config", "target_modules", *(f"lora_{field}" for field in LORA_FIELDS))

# Known by name, so that a configuration that needs one is refused and not half obeyed.
NOT_YET = (
    *("fsdp", "deepspeed", "tensor_parallel", "load_in_4bit", "load_in_8bit", "quantization_config", "use_dora"),
)


def not_yet(name: str) -> str:
    """The refusal of a setting that a later version will have."""
    return f"{name} is not yet available in this version: leave it out"


def check_names(settings: Iterable[str]) -> None:
    """Raise UnknownNameError for the first name that is no setting: not yet available, or with the nearest one."""
    for name in settings:
        if name in NOT_YET:
            raise UnknownNameError(not_yet(name))
        if name not in FineTuningConfig.model_fields:
            raise UnknownNameError(f"unknown setting '{name}'{nearest(name, FineTuningConfig.model_fields)}")


def read_settings(path: str | Path) -> dict[str, Any]:
    """The mapping that a YAML file holds, names checked, values not yet. Raises ConfigError that names the file."""
    try:
        settings = load_yaml(Path(path).read_text(encoding="utf-8"), f"{path}: ") or {}
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}): give the path of a YAML file") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not YAML: {error}") from None
    if not isinstance(settings, dict) or not all(isinstance(name, str) for name in settings):
        raise ConfigError(f"{path}: should hold lines of the form `setting: value`")
    try:
        check_names(settings)
    except UnknownNameError as error:
        raise UnknownNameError(f"{path}: {error}") from None
    return settings


def settle_names(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The same settings, each under its first name: `target_modules` and the fields of `lora_config` become `lora_*`.

    What was not given stays out, so that it beats nothing that another source gives.

    Raises UnknownNameError for a name that is no setting, ConfigError where two names give different values.
    """
    check_names(settings)
    settled = {name: value for name, value in settings.items() if name != "target_modules"}
    aliases = [("lora_target_modules", "target_modules", settings)]
    if settings.get("lora_config") is not None:
        fields = _fields(settings["lora_config"])
        aliases += [(f"lora_{field}", f"lora_config.{field}", fields) for field in LORA_FIELDS]
        settled["lora_config"] = {field: value for field, value in fields.items() if field not in LORA_FIELDS}
    for name, alias, source in aliases:
        key = alias.rpartition(".")[2]
        if key not in source:
            continue
        mine, value = settled.get(name), source[key]
        if value is not None and mine is not None and mine != value:
            raise ConfigError(f"{name}={mine!r} contradicts {alias}={value!r}: give one of them")
        settled[name] = mine if value is None else value
    return settled


def _extra(name: str) -> Any:
    """What `row` says of a setting beyond what pydantic knows."""
    return FineTuningConfig.model_fields[name].json_schema_extra


def _fields(lora: Any) -> dict[str, Any]:
    """What was given of the adapters' settings, as a mapping or a LoRAConfig."""
    if isinstance(lora, Mapping) and all(isinstance(field, str) for field in lora):
        return dict(lora)
    if isinstance(lora, BaseModel):
        return lora.model_dump(include=lora.model_fields_set)
    raise ConfigError(f"lora_config={lora!r} should be a LoRAConfig or a mapping of its fields")


def types(annotation: Any) -> tuple[Any, ...]:
    """The members of a union, or the one type."""
    return get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)


def _raise(error: ValidationError, settings: Mapping[str, Any]) -> NoReturn:
    """Turn pydantic's report into one ConfigError: every wrong setting, what was given, what it should be."""
    wrong: list[str] = []
    for problem in error.errors():
        cause = problem.get("ctx", {}).get("error")
        if isinstance(cause, ConfigError):
            raise cause from None
        text = str(cause) if cause else problem["msg"].replace("Input should", "should")
        name = str(problem["loc"][0]) if problem["loc"] else ""
        said = f"{name}={settings[name]!r} {text}" if name in settings else f"{name} {text}".strip()
        if said not in wrong:
            wrong.append(said)
    raise ConfigError("; ".join(wrong)) from None
