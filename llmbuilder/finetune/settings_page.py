"""Prints docs/settings.md: `python -m llmbuilder.finetune.settings_page > docs/settings.md`."""

from .config import NOT_YET, rows

_TOP = """# Settings

One row a setting of `FineTuningConfig`, in Python, in the file of `--config` (YAML) and as a flag of
`llmbuilder finetune model`. A flag beats the file, the file beats the default. `none` switches off what may be off.
This page is made from the code; a test holds it up to date.

| setting | flag | type | default | effect | seen by |
|---|---|---|---|---|---|
"""


def settings_page() -> str:
    """The page: a table of all settings, then what is refused because it is not available yet."""
    lines = [
        f"| `{row.name}` | {', '.join(f'`{flag}`' for flag in row.flags)} | {row.type.replace('|', ' or ')} "
        f"| {row.default} | {row.effect} | {row.observable} |"
        for row in rows().values()
    ]
    later = ", ".join(f"`{name}`" for name in NOT_YET)
    return f"{_TOP}{chr(10).join(lines)}\n\nNot yet available, and refused by name: {later}.\n"


if __name__ == "__main__":
    print(settings_page(), end="")
