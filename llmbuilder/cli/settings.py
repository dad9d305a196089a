"""The settings as flags, and the configuration that flags and a file make: flag > file > default."""

from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import ConfigError
from ..finetune.config import FineTuningConfig, read_settings, settle_names
from ..finetune.settings import Row, rows
from ..finetune.yaml_text import load_yaml


def add_settings(parser: ArgumentParser, table: Iterable[Row]) -> None:
    """--config, and a flag for every setting of the table."""
    parser.add_argument("--config", metavar="path", help="YAML file of settings; a flag beats it")
    group = parser.add_argument_group("settings")
    for row in table:
        default = "" if row.default == "none" else f" (default: {row.default})"
        help_text = f"{row.effect}{default}".replace("%", "%%")
        if row.is_switch:
            group.add_argument(*row.flags, dest=row.name, action=BooleanOptionalAction, default=None, help=help_text)
        else:
            many = "+" if row.is_list else None
            group.add_argument(*row.flags, dest=row.name, nargs=many, metavar=row.type, help=help_text)


def read_config(args: Namespace) -> FineTuningConfig:
    """The configuration of a command line that `add_settings` has parsed.

    Raises:
        ConfigError: as FineTuningConfig does; the file is named where a setting in it is at fault.
    """
    given = {name: getattr(args, name, None) for name in rows()}
    flags = {name: _value(name, text) for name, text in given.items() if text is not None}
    file = {} if args.config is None else _read_file(args.config, flags)
    above = settle_names(flags)
    both = file | above
    if file.get("lora_config") is not None and above.get("lora_config") is not None:
        both["lora_config"] = file["lora_config"] | above["lora_config"]
    try:
        return FineTuningConfig(**both)
    except ConfigError as error:
        from_file = any(name in str(error) and name not in above for name in file)
        raise type(error)(f"{args.config}: {error}" if from_file else str(error)) from None


def _read_file(path: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """The file's settings under their first names, but for a lora_config that `--lora-config none` drops: once they are
    settled, its rank and targets no longer stand there."""
    settings = read_settings(path)
    if "lora_config" in flags and flags["lora_config"] is None:
        settings.pop("lora_config", None)
    try:
        return settle_names(settings)
    except ConfigError as error:
        raise type(error)(f"{path}: {error}") from None


def _value(name: str, text: Any) -> Any:
    """What a flag says: `none` is None, one name is no list, and mappings and pairs come in YAML's words."""
    if isinstance(text, list) and len(text) == 1:
        (text,) = text
    if text == "none":
        return None
    if not rows()[name].is_yaml:
        return text
    return load_yaml(text, f"--{name.replace('_', '-')} {text!r}: ")
