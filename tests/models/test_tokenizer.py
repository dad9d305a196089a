"""Any text comes back from its tokens."""

from pathlib import Path

import pytest
import transformers
from hypothesis import example, given, settings
from hypothesis import strategies as st

from llmbuilder.errors import LLMBuilderError
from llmbuilder.models import byte_tokenizer, train_tokenizer

BYTES = byte_tokenizer()
VERSE = "Tyger Tyger, burning bright,\nIn the forests of the night;\nWhat immortal hand or eye,\n" * 3


@given(st.text())
@example("  two spaces, a tab\t and é 漢字 🐅 \x00 \r\n")
@settings(max_examples=300, deadline=None)
def test_each_byte_is_a_token_and_its_own_id(text: str) -> None:
    ids = BYTES(text).input_ids
    assert ids == list(text.encode())
    assert BYTES.decode(ids) == text


def test_special_tokens_have_ids_of_their_own() -> None:
    assert BYTES("a<|endoftext|>b").input_ids == [97, 256, 98]
    assert (BYTES.eos_token_id, BYTES.pad_token_id, len(BYTES)) == (256, 257, 258)
    assert BYTES.decode([97, 256, 98], skip_special_tokens=True) == "ab"
    assert BYTES(["a", "bcd"], padding=True).input_ids == [[97, 257, 257], [98, 99, 100]]


def test_it_is_a_fast_transformers_tokenizer_with_offsets() -> None:
    assert isinstance(BYTES, transformers.PreTrainedTokenizerFast) and BYTES.is_fast
    assert BYTES("aé", return_offsets_mapping=True).offset_mapping == [(0, 1), (1, 2), (1, 2)]


def test_it_survives_saving(tmp_path: Path) -> None:
    BYTES.save_pretrained(tmp_path)
    again = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert again("é<|endoftext|>").input_ids == [195, 169, 256] and again.pad_token_id == 257


def test_a_trained_tokenizer_learns_what_is_frequent_and_loses_nothing(tmp_path: Path) -> None:
    (tmp_path / "verse.txt").write_text(VERSE, encoding="utf-8")
    tokenizer = train_tokenizer([tmp_path / "verse.txt"], vocab_size=300)
    assert len(tokenizer) == 300
    assert len(tokenizer(VERSE).input_ids) < 0.5 * len(VERSE)
    assert tokenizer.convert_tokens_to_ids("Ġthe") is not None and "Ġthe" in tokenizer.get_vocab()
    for text in (VERSE, "another text: é 漢字 🐅\x00", "  spaces \n\n"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.decode(tokenizer("x<|endoftext|>").input_ids, skip_special_tokens=True) == "x"
    assert tokenizer.eos_token == "<|endoftext|>" and tokenizer.pad_token == "<|pad|>"


def test_training_repeats(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(VERSE, encoding="utf-8")
    (tmp_path / "b.txt").write_text("another file, another text", encoding="utf-8")
    files = [tmp_path / "a.txt", tmp_path / "b.txt"]
    first, second = (train_tokenizer(files, vocab_size=320) for _ in range(2))
    assert first.backend_tokenizer.to_str() == second.backend_tokenizer.to_str()


def test_what_cannot_be_trained_on_is_refused(tmp_path: Path) -> None:
    with pytest.raises(LLMBuilderError, match="vocab_size must be at least 258, got 257"):
        train_tokenizer([], vocab_size=257)
    with pytest.raises(LLMBuilderError, match=f"cannot read {tmp_path / 'none.txt'}"):
        train_tokenizer([tmp_path / "none.txt"], vocab_size=300)
    (tmp_path / "latin.txt").write_bytes("é".encode("latin-1"))
    with pytest.raises(LLMBuilderError, match=r"latin\.txt"):
        train_tokenizer([tmp_path / "latin.txt"], vocab_size=300)
