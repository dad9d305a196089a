"""The table of settings: the command line's flags, and docs/settings.md.

`python -m llmbuilder.finetune.settings > docs/settings.md` writes the page.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from .config import NOT_YET, FineTuningConfig, types

_TOP = """# Settings

One row a setting of `FineTuningConfig`, in Python, in the file of `--config` (YAML) and as a flag of
`llmbuilder finetune model`. A flag beats the file, the file beats the default. `none` switches off what may be off.
This page is made from the code; a test holds it up to date.

| setting | flag | type | default | effect | seen by | tested in |
|---|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """One setting, as the command line and docs/settings.md show it."""

    name: str
    flags: tuple[str, ...]
    type: str
    default: str
    effect: str
    observable: str
    test: str
    changes_weights: bool
    is_switch: bool  # --name and --no-name
    is_list: bool
    is_yaml: bool  # a mapping or pairs, which the command line takes in YAML's words


def rows() -> dict[str, Row]:
    """The table of all settings, by name."""
    table = {}
    for name, field in FineTuningConfig.model_fields.items():
        extra: Any = field.json_schema_extra
        kinds = [kind for kind in types(field.annotation) if kind is not type(None)]
        short = [f"--{extra['flag']}"] if extra["flag"] else []
        table[name] = Row(
            name=name,
            flags=(*short, f"--{name.replace('_', '-')}"),
            type=_type_text(kinds[0]),
            default="none" if field.default is None else str(field.default).lower(),
            effect=field.description or "",
            observable=extra["observable"],
            test=extra["test"],
            changes_weights=extra["changes_weights"],
            is_switch=kinds == [bool],
            is_list=list[str] in kinds,
            is_yaml=_type_text(kinds[0]) in ("mapping", "pairs"),
        )
    return table


def settings_page() -> str:
    """The page: a table of all settings, then what is refused because it is not available yet."""
    lines = [
        f"| `{row.name}` | {', '.join(f'`{flag}`' for flag in row.flags)} | {row.type.replace('|', ' or ')} "
        f"| {row.default} | {row.effect} | {row.observable} | [test](../tests/{row.test}) |"
        for row in rows().values()
    ]
    later = ", ".join(f"`{name}`" for name in NOT_YET)
    return f"{_TOP}{chr(10).join(lines)}\n\nNot yet available, and refused by name: {later}.\n"


def _type_text(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "|".join(get_args(kind))
    if get_origin(kind) is dict:
        return "mapping"
    if get_origin(kind) is list:
        return "names" if kind == list[str] else "pairs"
    return {bool: "switch", int: "int", float: "float", str: "text", Path: "path", Any: "mapping"}[kind]


if __name__ == "__main__":
    print(settings_page(), end="")
