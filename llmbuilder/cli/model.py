"""What the commands that run a model share: its flags, how it is opened, how it continues a text."""

import math
import os
import sys
import warnings
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from ..errors import LLMBuilderError


def model_arguments(parser: ArgumentParser, adapter_required: bool = False) -> None:
    """--model, --adapter and --task; no task where an adapter is required."""
    parser.add_argument(
        "--model", required=True, metavar="path", help="native checkpoint, Hugging Face folder or hub id, or GGUF file"
    )
    parser.add_argument(
        "--adapter", required=adapter_required, metavar="folder", help="an adapter in PEFT's format, as a run leaves it"
    )
    if adapter_required:
        parser.set_defaults(task=None)
    else:
        parser.add_argument(
            "--task",
            metavar="name",
            help="serve this task of a run with heads or adapters of tasks: its heads/ lie beside the folder that "
            "--adapter (else --model) names, and for adapters of tasks --adapter names all of them: RUN/adapters",
        )


def sampling_arguments(parser: ArgumentParser, max_new_tokens: int) -> None:
    """How much text a model shall make (without the flag: as much of the default as there is room for), and how it
    chooses."""
    parser.add_argument(
        "--max-new-tokens",
        type=int,
        metavar="int",
        help=f"most tokens to make (default: {max_new_tokens}, or what the model's context leaves)",
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.0,
        metavar="float",
        help="0: the likeliest token; else drawn from softmax(logits / temperature) (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="int", help="of the draws (default: %(default)s)")
    parser.set_defaults(usual_new_tokens=max_new_tokens)


def check_sampling(args: Namespace) -> None:
    """Raise LLMBuilderError for a --temperature or a --seed that nothing can be drawn by."""
    if not (math.isfinite(args.temperature) and args.temperature >= 0):
        raise LLMBuilderError(f"--temperature {args.temperature} should be a finite number, 0 or more")
    if not -(2**63) <= args.seed < 2**64:  # what torch takes
        raise LLMBuilderError(f"--seed {args.seed} should be at least -2**63 and less than 2**64")


def check_utf8(text: str, where: str) -> str:
    """The text. Raises LLMBuilderError where it has bytes that are no UTF-8, which Python keeps as surrogates."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise LLMBuilderError(f"{where} is not UTF-8 at character {error.start}: {text[:80]!a}") from None
    return text


def open_model(
    args: Namespace,
    *,
    one_adapter: str = "choose by --task",
    no_head: str = "without --task the model's own answers",
) -> Any:
    """The model of --model with the adapter of --adapter and what --task has of its own, in evaluation mode, on this
    process's kept memory.

    ``one_adapter`` and ``no_head`` say what to do where adapters or heads of tasks lie there and no task is chosen.
    """
    if args.adapter is not None and not Path(args.adapter).is_dir():
        raise LLMBuilderError(f"{args.adapter}: no such folder; --adapter takes the folder adapter/ of a run")

    from ..models import load_model
    from ..nn import list_tasks, load_adapter, load_task
    from .memory import keep_freed_memory

    run, of_tasks, own_task = _where(args)
    if of_tasks and args.task is None:
        raise LLMBuilderError(f"{args.adapter} holds an adapter for each task: {one_adapter}, of {list_tasks(run)}")
    if own_task is not None and args.task not in (None, own_task):
        raise LLMBuilderError(f"{args.adapter} is the adapter of the task '{own_task}': give --task {own_task}")
    if args.task is None and (run / "heads" / "heads.safetensors").is_file():
        warnings.warn(f"{run / 'heads'} has an output head for each of {list_tasks(run)}: {no_head}", stacklevel=2)

    keep_freed_memory()
    warn_of_slow_operators()
    model = load_model(args.model)
    if model.tokenizer is None:
        raise LLMBuilderError(f"{args.model}: the model has no tokenizer, so no text goes in or out")
    comes_with_task = args.task is not None and (of_tasks or own_task is not None)
    if args.adapter is not None and not comes_with_task:
        load_adapter(model, args.adapter)
    if args.task is not None:
        load_task(model, run, args.task)
    return model.eval()


def _where(args: Namespace) -> tuple[Path, bool, str | None]:
    """The run that --adapter, else --model, is a part of; whether it names the adapters of all tasks; whose of them."""
    place = Path(os.path.abspath(args.model if args.adapter is None else args.adapter))
    run = place.parent
    if args.adapter is not None and run.name == "adapters" and not (run / "heads").is_dir():  # no run of that name
        return run.parent, False, place.name
    return run, args.adapter is not None and place.name == "adapters", None


class Sampler:
    """Makes text with a model, by the flags of `sampling_arguments`; one seed for all that it makes."""

    def __init__(self, model: Any, args: Namespace) -> None:
        import torch

        self.model = model
        self.asked_tokens: int | None = args.max_new_tokens
        self.max_new_tokens: int = args.usual_new_tokens if self.asked_tokens is None else self.asked_tokens
        self.temperature = args.temperature
        self.generator = torch.Generator().manual_seed(args.seed)

    def text(self, prompt: list[int], max_new_tokens: int | None = None) -> str:
        """What follows the prompt's tokens, up to an end of text."""
        from ..models import context_length, end_ids, generate

        most = self.max_new_tokens if max_new_tokens is None else max_new_tokens
        limit = context_length(self.model)
        if self.asked_tokens is None and limit is not None:
            most = max(1, min(most, limit - len(prompt)))
        (tokens,) = generate(
            self.model, [prompt], most, self.temperature, stop_ids=end_ids(self.model), generator=self.generator
        )
        return str(self.model.tokenizer.decode(tokens, skip_special_tokens=True))


def warn_of_slow_operators() -> None:
    """One line on stderr where the compiled kernels are missing: everything works, but slowly."""
    from ..ops import _native

    reason = _native.why_not()
    if reason:
        print(f"llmbuilder: slow, without its compiled kernels: {reason}", file=sys.stderr)
