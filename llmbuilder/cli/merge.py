"""Write a model with its adapter merged into the weights."""

from argparse import ArgumentParser, Namespace
from pathlib import Path

from ..errors import LLMBuilderError
from .model import model_arguments, open_model

USAGE = "--model PATH --adapter FOLDER --output FOLDER [--untie] [--overwrite]"


def arguments(parser: ArgumentParser) -> None:
    """The model, its adapter and where the merged model goes."""
    model_arguments(parser, adapter_required=True)
    parser.add_argument("--output", required=True, metavar="folder", help="where the merged model goes")
    parser.add_argument(
        "--untie",
        action="store_true",
        help="give head and embedding a weight each, where the adapter is on one of them",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what --output holds")


def run(args: Namespace) -> int:
    """Merge and save."""
    output = Path(args.output)
    if output.exists() and not args.overwrite and (not output.is_dir() or any(output.iterdir())):
        raise LLMBuilderError(f"{output}: not empty; name another folder or give --overwrite")
    model = open_model(
        args,
        one_adapter=f"name the one to merge, {Path(args.adapter) / 'TASK'}",
        no_head="the merged model keeps its own and goes without them",
    )

    from ..models import save_model
    from ..nn import merge_lora

    merge_lora(model, keep_base=False, untie=args.untie)
    save_model(model, output)
    print(f"the merged model is in {output}")
    return 0
