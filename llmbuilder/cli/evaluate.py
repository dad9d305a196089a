"""Loss, perplexity, BLEU and accuracy of a model on a data set."""

import json
import math
from argparse import ArgumentParser, Namespace

from ..finetune.settings import rows
from .model import model_arguments, open_model
from .settings import add_settings, read_config

USAGE = "--model PATH [--adapter FOLDER] [--task NAME] --dataset PATH [--json] [settings]"

# The settings that bear on how data are read and batched.
SETTINGS = (
    *("batch_size", "task_type", "max_seq_length", "data_collator", "dataloader_num_workers"),
    *("dialogue_format", "turn_separator", "response_loss_only", "max_turns"),
)


def arguments(parser: ArgumentParser) -> None:
    """The model, the data, and the settings that bear on them."""
    model_arguments(parser)
    parser.add_argument("--dataset", required=True, metavar="path", help="text, jsonl or parquet: a file or a folder")
    parser.add_argument("--json", action="store_true", help="print one JSON object; what cannot be told is null")
    add_settings(parser, [rows()[name] for name in SETTINGS])


def run(args: Namespace) -> int:
    """Judge the model and print how it did."""
    config = read_config(args)

    from ..data import MultiTaskDataset, load_dataset
    from ..finetune.judge import Judge
    from ..finetune.loader import Loader

    dataset = load_dataset(args.dataset, config)
    model = open_model(args)
    if args.task is not None and isinstance(dataset, MultiTaskDataset):
        dataset = dataset.part(args.task)
    results = Judge(model, Loader(model, config)).evaluate(dataset)
    values = {
        "loss": results.loss,
        "perplexity": results.perplexity,
        "bleu_score": results.bleu_score,
        "task_accuracy": results.task_accuracy,
        "tokens": results.tokens,
    }
    if args.json:
        print(json.dumps({name: value if math.isfinite(value) else None for name, value in values.items()}))
    else:
        print(dataset.report)
        for name, value in values.items():
            print(f"{name:<15}{value:.6g}")
    return 0
