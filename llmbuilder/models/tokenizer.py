"""Tokenizers for the native model, built with ``tokenizers`` and wrapped as transformers' fast tokenizers."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from ..errors import LLMBuilderError

END_OF_TEXT = "<|endoftext|>"
PAD = "<|pad|>"
SPECIAL = (END_OF_TEXT, PAD)


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """The default tokenizer: each byte of the UTF-8 text is a token, and its id is the byte's value.

    Returns:
        A tokenizer of 258 ids: 0 to 255 the bytes, 256 ``<|endoftext|>`` (end of text), 257 ``<|pad|>``. Any text comes
        back from its ids unchanged.
    """
    tokenizer = Tokenizer(models.BPE(vocab={sign: byte for byte, sign in enumerate(_byte_signs())}, merges=[]))
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL])
    return _wrap(tokenizer)


def train_tokenizer(texts: Iterable[str | Path], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer (arXiv 1508.07909) learnt from text files.

    Args:
        texts: paths of UTF-8 text files.
        vocab_size: number of ids, the 256 bytes and the two special tokens included; at least 258. Fewer come out when
            the text has too few repeated pairs.

    Returns:
        A tokenizer with ``<|endoftext|>`` and ``<|pad|>``. The same files in the same order give the same tokenizer.

    Raises:
        LLMBuilderError: ``vocab_size`` below 258, or a file that can't be read.
    """
    if vocab_size < 256 + len(SPECIAL):
        raise LLMBuilderError(f"train_tokenizer: vocab_size must be at least {256 + len(SPECIAL)}, got {vocab_size}")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=_byte_signs(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((_read(Path(path)) for path in texts), trainer)
    return _wrap(tokenizer, split_words=True)


def _wrap(tokenizer: Tokenizer, split_words: bool = False) -> PreTrainedTokenizerFast:
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=split_words)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=END_OF_TEXT, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise LLMBuilderError(f"train_tokenizer: cannot read {path}: {error}") from error


def _byte_signs() -> Sequence[str]:
    """The printable sign that byte-level tokenizers write for each byte (as GPT-2 chose them).

    Visible Latin-1 bytes stand for themselves; the others take the code points from 256 on, in order.
    """
    visible = {*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)}
    signs, spare = [], 256
    for byte in range(256):
        signs.append(chr(byte if byte in visible else spare))
        spare += byte not in visible
    return signs
