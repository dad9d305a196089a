"""Fine-tune a model on a data set. A flag beats the file given with --config, and the file beats the default."""

import shlex
from argparse import ArgumentParser, BooleanOptionalAction, Namespace
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..finetune.config import FineTuningConfig, read_settings, rows, settle_names

USAGE = "--model PATH --dataset PATH --output FOLDER [settings]"


def arguments(parser: ArgumentParser) -> None:
    """The run's own flags, then one for every setting."""
    parser.add_argument(
        "--model", required=True, metavar="path", help="native checkpoint, Hugging Face folder or GGUF file"
    )
    parser.add_argument("--dataset", required=True, metavar="path", help="text, jsonl or parquet: a file or a folder")
    parser.add_argument("--val-dataset", metavar="path", help="validation data, like --dataset")
    parser.add_argument("--config", metavar="path", help="YAML file of settings")
    parser.add_argument("--resume", action="store_true", help="go on from the newest good checkpoint in --output")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that --output holds")
    settings = parser.add_argument_group("settings")
    for name, row in rows().items():
        default = "" if row.default == "none" else f" (default: {row.default})"
        help_text = f"{row.effect}{default}".replace("%", "%%")
        if row.is_switch:
            settings.add_argument(*row.flags, dest=name, action=BooleanOptionalAction, default=None, help=help_text)
        else:
            many = "+" if row.is_list else None
            settings.add_argument(*row.flags, dest=name, nargs=many, metavar=row.type, help=help_text)


def run(args: Namespace) -> int:
    """Train, then print what came of it and how to chat with it."""
    config = _config(args)
    if config.output_dir is None:
        raise ConfigError("--output is missing: name the folder that the run shall write")

    from ..data import load_dataset
    from ..finetune import FineTuner
    from ..models import load_model
    from .memory import keep_freed_memory
    from .model import warn_of_slow_operators

    keep_freed_memory()
    warn_of_slow_operators()
    dataset = load_dataset(args.dataset, config)
    val_dataset = load_dataset(args.val_dataset, config) if args.val_dataset else None
    model = load_model(args.model)
    tuner = FineTuner(model, dataset, val_dataset, config, resume=args.resume, overwrite=args.overwrite)
    results = tuner.train()
    print(results)
    print(f"chat with it: {_chat_command(args.model, config.output_dir)}")
    return 0


def _config(args: Namespace) -> FineTuningConfig:
    """Flag > file > default."""
    flags = {name: _value(name, getattr(args, name)) for name in rows() if getattr(args, name) is not None}
    file = settle_names(read_settings(args.config)) if args.config else {}
    try:
        return FineTuningConfig(**file | settle_names(flags))
    except ConfigError as error:
        from_file = any(name in str(error) and name not in flags for name in file)
        raise type(error)(f"{args.config}: {error}" if from_file else str(error)) from None


def _value(name: str, text: Any) -> Any:
    """What a flag says: `none` is None, and --lora-config takes a mapping in YAML's words."""
    if text == "none":
        return None
    if name == "lora_config":
        import yaml

        return yaml.safe_load(text)
    return text


def _chat_command(model: str, output: Path) -> str:
    adapter = output / "adapter"
    tuned = ["--model", model, "--adapter", str(adapter)] if adapter.is_dir() else ["--model", str(output / "model")]
    return shlex.join(["llmbuilder", "chat", *tuned])
