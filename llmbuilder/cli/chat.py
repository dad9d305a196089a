"""Talk with a model. /exit or the end of input leaves; text that is piped in is answered line by line."""

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from typing import Any

from ..errors import LLMBuilderError
from .model import Sampler, check_sampling, check_utf8, model_arguments, open_model, sampling_arguments

USAGE = (
    "--model PATH [--adapter FOLDER] [--task NAME] [--system TEXT] [--max-new-tokens N] [--temperature T] [--seed N]"
)


def arguments(parser: ArgumentParser) -> None:
    """The model, what it is told beforehand, and how it answers."""
    model_arguments(parser)
    parser.add_argument("--system", metavar="text", help="system message: what the model is told before you speak")
    sampling_arguments(parser, max_new_tokens=256)


def run(args: Namespace) -> int:
    """Answer each line, knowing those before it."""
    check_sampling(args)
    messages = [{"role": "system", "content": check_utf8(args.system, "--system")}] if args.system else []
    model = open_model(args)
    sampler = Sampler(model, args)
    for line in _lines():
        messages.append({"role": "user", "content": line})
        answer = _answer(model, sampler, messages).strip()
        print(answer, flush=True)
        messages.append({"role": "assistant", "content": answer})
    return 0


def _lines() -> Iterator[str]:
    """What is said: from a prompt at a terminal, else the lines of standard input."""
    at_terminal = sys.stdin.isatty()
    if at_terminal:
        import readline  # noqa: F401  # gives input() its line editing

        print("Say something; /exit leaves.")
    while True:
        try:
            line = check_utf8(input("> " if at_terminal else "").strip(), "what you said")
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise LLMBuilderError(f"what you said is not {error.encoding}: {error.object[:80]!r}") from None
        if line == "/exit":
            return
        if line:
            yield line


def _answer(model: Any, sampler: Sampler, messages: list[dict[str, str]]) -> str:
    """The next answer. What no longer fits into the model's context is forgotten, oldest first, and that is said."""
    from ..models import chat_prompt, context_length

    limit = context_length(model)
    prompt = chat_prompt(model.tokenizer, messages)
    if limit is None:
        return sampler.text(prompt)
    wanted = min(sampler.max_new_tokens, limit // 2)
    forgotten = 0
    first = 1 if messages[0]["role"] == "system" else 0
    while len(prompt) + wanted > limit and len(messages) > first + 1:
        del messages[first : first + 2]
        forgotten += 1
        prompt = chat_prompt(model.tokenizer, messages)
    if forgotten:
        print(f"llmbuilder: forgot the oldest {forgotten} exchanges: the model reads {limit} tokens", file=sys.stderr)
    if len(prompt) >= limit:
        raise LLMBuilderError(f"the message is too long: {len(prompt)} tokens, where the model reads {limit} in all")
    return sampler.text(prompt, min(sampler.max_new_tokens, limit - len(prompt)))
