"""Continue a prompt. Prints the new text only."""

from argparse import ArgumentParser, Namespace

from .model import Sampler, check_sampling, check_utf8, model_arguments, open_model, sampling_arguments

USAGE = "--model PATH [--adapter FOLDER] [--task NAME] --prompt TEXT [--max-new-tokens N] [--temperature T] [--seed N]"


def arguments(parser: ArgumentParser) -> None:
    """The model, the prompt, and how to continue it."""
    model_arguments(parser)
    parser.add_argument("--prompt", required=True, metavar="text", help="the text to continue")
    sampling_arguments(parser, max_new_tokens=128)


def run(args: Namespace) -> int:
    """Print the continuation."""
    check_sampling(args)
    prompt = check_utf8(args.prompt, "--prompt")
    model = open_model(args)
    print(Sampler(model, args).text(list(model.tokenizer(prompt)["input_ids"])))
    return 0
