"""A conversation becomes the prompt that the model knows."""

import pytest
from tokenizers.processors import Sequence, TemplateProcessing

from llmbuilder.data.templates import plain_conversation
from llmbuilder.errors import LLMBuilderError
from llmbuilder.models import byte_tokenizer, chat_prompt

MESSAGES = [
    {"role": "system", "content": "Be {brief}."},
    {"role": "user", "content": "Where is Paris?"},
    {"role": "assistant", "content": "In France."},
    {"role": "user", "content": "And Rome?"},
]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}<|endoftext|>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def test_the_chat_template_is_used_where_there_is_one() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    ids = chat_prompt(tokenizer, MESSAGES[:2])
    assert tokenizer.decode(ids) == ("<system>Be {brief}.<|endoftext|><user>Where is Paris?<|endoftext|><assistant>")
    assert ids.count(256) == 2, "the end of a turn is one token, not its letters"
    assert ids == tokenizer.apply_chat_template(MESSAGES[:2], add_generation_prompt=True)["input_ids"]


def test_the_beginning_of_text_is_written_once() -> None:
    tokenizer = byte_tokenizer()
    begin = TemplateProcessing(single="<|pad|> $A", special_tokens=[("<|pad|>", 257)])  # as Llama's adds its own
    tokenizer.backend_tokenizer.post_processor = Sequence([tokenizer.backend_tokenizer.post_processor, begin])
    assert chat_prompt(tokenizer, MESSAGES[:1])[0] == 257, "plain text is begun by the tokenizer"
    tokenizer.chat_template = "<|pad|>" + TEMPLATE
    assert chat_prompt(tokenizer, MESSAGES).count(257) == 1, "a template has begun already"


def test_without_a_template_turns_are_written_plainly() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.decode(chat_prompt(tokenizer, MESSAGES)) == (
        "Be {brief}.\n\nUser: Where is Paris?\nAssistant: In France.<|endoftext|>\nUser: And Rome?\nAssistant:"
    )


def test_the_plain_prompt_is_what_training_data_has_before_an_answer() -> None:
    tokenizer = byte_tokenizer()
    trained = plain_conversation([*MESSAGES, {"role": "assistant", "content": "In Italy."}], tokenizer.eos_token)
    assert trained.text[: trained.response_start] == tokenizer.decode(chat_prompt(tokenizer, MESSAGES))


def test_a_template_that_refuses_is_one_clear_error() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system messages') }}"
    with pytest.raises(LLMBuilderError, match="chat template refuses the conversation: no system messages"):
        chat_prompt(tokenizer, MESSAGES)


def test_an_unknown_role_names_the_nearest() -> None:
    with pytest.raises(LLMBuilderError, match=r"no role 'asistant'.*did you mean 'assistant'"):
        chat_prompt(byte_tokenizer(), [{"role": "asistant", "content": "Hi"}])
