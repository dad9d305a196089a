"""Small tokenizers: one token a byte, so that masks can be written by hand, and byte pairs, which may straddle."""

from types import SimpleNamespace

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# As many chat models have it: a system prompt of its own where none is given, pad equal to the end-of-turn token,
# no marks around what the assistant says.
CHATML = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}<|im_start|>system\nBe kind.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|im_start|>", "<|im_end|>", "<s>"]


def byte_level(vocab_size=259, texts=(), use_regex=True):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[AddedToken(token, special=True) for token in SPECIAL],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|im_end|>")


@pytest.fixture
def tokenizer():
    """One token a byte; no chat template; ``<|im_end|>`` ends a text."""
    return byte_level()


@pytest.fixture
def chat_tokenizer():
    """One token a byte, and the chat template above."""
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    return tokenizer


@pytest.fixture
def bpe_tokenizer():
    """Byte pairs learnt from a little English, so that tokens are of many lengths."""
    words = (
        "the quick brown fox jumps over the lazy dog while the other dogs sleep in the sun and dream of 1234 bones\n"
    )
    return byte_level(600, [words * 20, "Question: what is it? Answer: it is the answer.\n\n" * 20])


@pytest.fixture
def config():
    """The settings that data read, with their defaults; change them by keyword."""

    def make(**settings):
        defaults = {
            "max_seq_length": 1024,
            "task_type": None,
            "dialogue_format": False,
            "turn_separator": None,
            "response_loss_only": True,
            "max_turns": None,
        }
        return SimpleNamespace(**{**defaults, **settings})

    return make


@pytest.fixture
def check_segments():
    """Compare an example with segments of (text, learnt?) written by hand: every id and every label."""

    def check(example, tokenizer, segments):
        ids, labels = [], []
        for text, learnt in segments:
            part = tokenizer(text, add_special_tokens=False)["input_ids"]
            ids += part
            labels += part if learnt else [-100] * len(part)
        assert example["input_ids"] == ids, tokenizer.decode(example["input_ids"])
        assert example["labels"] == labels

    return check
