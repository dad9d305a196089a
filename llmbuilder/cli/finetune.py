"""Fine-tune a model on a data set. A flag beats the file given with --config, and the file beats the default."""

import shlex
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import ConfigError
from ..finetune.interrupt import interruptible
from ..finetune.settings import rows
from .settings import add_settings, read_config

if TYPE_CHECKING:
    from ..finetune import Results

USAGE = "--model PATH --dataset PATH --output FOLDER [settings]"


def arguments(parser: ArgumentParser) -> None:
    """The run's own flags, then one for every setting."""
    parser.add_argument(
        "--model", required=True, metavar="path", help="native checkpoint, Hugging Face folder or hub id, or GGUF file"
    )
    parser.add_argument("--dataset", required=True, metavar="path", help="text, jsonl or parquet: a file or a folder")
    parser.add_argument("--val-dataset", metavar="path", help="validation data, like --dataset")
    parser.add_argument("--general-dataset", metavar="path", help="what the model is for so far, like --dataset")
    parser.add_argument("--base-val-dataset", metavar="path", help="what the model can do already, like --dataset")
    parser.add_argument(
        "--continue-from", metavar="folder", help="train on the model or adapter of this earlier run, in a next task"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest good checkpoint in --output")
    parser.add_argument("--overwrite", action="store_true", help="replace the run that --output holds")
    add_settings(parser, rows().values())


def run(args: Namespace) -> int:
    """Train, then print what came of it and how to chat with it."""
    config = read_config(args)
    if config.output_dir is None:
        raise ConfigError("--output is missing: name the folder that the run shall write")
    with interruptible():  # train() listens itself
        if args.overwrite:
            _spare_inputs(args, config.output_dir)
        from ..data import load_dataset
        from ..finetune import FineTuner
        from ..models import load_model
        from .memory import keep_freed_memory
        from .model import warn_of_slow_operators

        keep_freed_memory()
        warn_of_slow_operators()
        dataset = load_dataset(args.dataset, config)
        val_dataset, general_dataset, base_val_dataset = (
            None if path is None else load_dataset(path, config)
            for path in (args.val_dataset, args.general_dataset, args.base_val_dataset)
        )
        model = load_model(args.model)
        tuner = FineTuner(
            model,
            dataset,
            val_dataset,
            config,
            resume=args.resume,
            overwrite=args.overwrite,
            general_dataset=general_dataset,
            base_val_dataset=base_val_dataset,
            continue_from=args.continue_from,
        )
    for data in (dataset, val_dataset, general_dataset, base_val_dataset):
        if data is not None:
            print(data.report)
    print(_summary(tuner.train()))
    print(f"Everything is in {config.output_dir}. Chat with the result:")
    print(f"  {_chat_command(args.model, config.output_dir)}")
    return 0


def _spare_inputs(args: Namespace, output: Path) -> None:
    """Raise ConfigError where the run would read what it overwrites: a model in its own folder, say."""
    from ..finetune.folder import CONTENT

    for name in ("model", "dataset", "val_dataset", "general_dataset", "base_val_dataset"):
        given = getattr(args, name)
        path = Path(given or ".").resolve()
        if given is not None and any(path.is_relative_to((output / content).resolve()) for content in CONTENT):
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} {given} lies in {output}, which --overwrite replaces: give another --output")


def _summary(results: "Results") -> str:
    base, final, better = results.base_perplexity, results.final_perplexity, results.improvement_percentage
    return (
        f"Perplexity on {results.evaluated_on} data {base:.2f} before, {final:.2f} after (improvement {better:.1f} %); "
        f"{results.steps} steps in {results.training_time}"
    )


def _chat_command(model: str, output: Path) -> str:
    from ..nn import list_tasks

    adapter = next((output / name for name in ("adapter", "adapters") if (output / name).is_dir()), None)
    tuned = ["--model", str(output / "model")] if adapter is None else ["--model", model, "--adapter", str(adapter)]
    task = [word for name in list_tasks(output)[:1] for word in ("--task", name)]
    return shlex.join(["llmbuilder", "chat", *tuned, *task])
