"""Prompts and masks of requests and conversations, token by token against expectations written by hand."""

import json
from datetime import datetime

import pytest
from tokenizers import AddedToken
from tokenizers.processors import TemplateProcessing
from transformers import AutoTokenizer

from llmbuilder.data import ChatDataset, TaskDataset
from llmbuilder.errors import ConfigError, LLMBuilderError
from llmbuilder.models import chat_prompt

ALPACA = {"instruction": "Add {request}", "input": "1 {context}", "output": "3"}
SYSTEM = "<|im_start|>system\nBe kind.<|im_end|>\n"


def conversation(*contents, system=None):
    turns = [{"role": ("user", "assistant")[n % 2], "content": content} for n, content in enumerate(contents)]
    return {"messages": ([{"role": "system", "content": system}] if system else []) + turns}


# Without a chat template: the plain table


@pytest.mark.parametrize(
    ("task_type", "row", "prompt", "response"),
    [
        (
            "instruction",
            ALPACA,
            "### Instruction:\nAdd {request}\n\n### Input:\n1 {context}\n\n### Response:\n",
            "3<|im_end|>",
        ),
        ("instruction", {"prompt": "p", "completion": "c"}, "### Instruction:\np\n\n### Response:\n", "c<|im_end|>"),
        ("question_answering", {"question": "q?", "answer": "a"}, "Question: q?\nAnswer:", " a<|im_end|>"),
        (
            "question_answering",
            {"question": "q?", "context": "c.", "answers": {"text": ["a", "b"]}},
            "Context: c.\nQuestion: q?\nAnswer:",
            " a<|im_end|>",
        ),
        ("summarization", {"document": "long", "summary": "s"}, "### Text:\nlong\n\n### Summary:\n", "s<|im_end|>"),
        ("code", {"instruction": "add", "output": "x+y"}, "### Task:\nadd\n\n### Code:\n", "x+y<|im_end|>"),
        ("conversation", {"prompt": "hi", "completion": "yo"}, "User: hi\nAssistant:", " yo<|im_end|>"),
    ],
)
def test_plain_prompts_and_masks(tokenizer, check_segments, task_type, row, prompt, response):
    dataset = TaskDataset([row], task_type, tokenizer)
    behind = [("\n", False)] if task_type == "conversation" else []
    check_segments(dataset[0], tokenizer, [(prompt, False), (response, True), *behind])
    reference = response.strip().removesuffix("<|im_end|>")
    assert dataset.generation_pairs(1) == [(tokenizer(prompt)["input_ids"], reference)]
    assert dataset.metric == ("exact_match" if task_type == "question_answering" else "next_token")
    assert dataset.task_type == task_type


def test_a_plain_conversation(tokenizer, check_segments):
    dataset = ChatDataset([conversation("a", "b", "c", "d", system="s")], tokenizer)
    check_segments(
        dataset[0],
        tokenizer,
        [
            ("s\n\nUser: a\nAssistant:", False),
            (" b<|im_end|>", True),
            ("\nUser: c\nAssistant:", False),
            (" d<|im_end|>", True),
            ("\n", False),
        ],
    )


def test_the_tokenizer_adds_its_begin_of_text_where_no_template_does(tokenizer, check_segments):
    begin = tokenizer.convert_tokens_to_ids("<s>")
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    dataset = TaskDataset([{"question": "q?", "answer": "a"}], "question_answering", tokenizer)
    check_segments(dataset[0], tokenizer, [("<s>Question: q?\nAnswer:", False), (" a<|im_end|>", True)])
    assert dataset.generation_pairs(1)[0][0][0] == begin


def test_a_tokenizer_without_an_end_of_text(tokenizer, check_segments):
    tokenizer.eos_token = None
    dataset = TaskDataset([{"question": "q?", "answer": "a"}], "question_answering", tokenizer)
    check_segments(dataset[0], tokenizer, [("Question: q?\nAnswer:", False), (" a", True)])
    assert "no end-of-text token" in str(dataset.report)


# With a chat template


@pytest.mark.parametrize(
    ("task_type", "row", "message", "response"),
    [
        ("instruction", ALPACA, "Add {request}\n\n1 {context}", "3"),
        ("question_answering", {"question": "q?", "context": "c.", "answer": "a"}, "c.\n\nq?", "a"),
        ("summarization", {"document": "d", "summary": "s"}, "Summarize the following text.\n\nd", "s"),
        ("code", {"prompt": "p", "completion": "c"}, "p", "c"),
    ],
)
def test_chat_template_prompts_and_masks(chat_tokenizer, check_segments, task_type, row, message, response):
    dataset = TaskDataset([row], task_type, chat_tokenizer)
    prompt = f"{SYSTEM}<|im_start|>user\n{message}<|im_end|>\n<|im_start|>assistant\n"
    check_segments(dataset[0], chat_tokenizer, [(prompt, False), (f"{response}<|im_end|>", True), ("\n", False)])
    assert dataset.generation_pairs(1) == [(chat_tokenizer(prompt)["input_ids"], response)]


def test_no_begin_of_text_is_added_to_what_the_chat_template_writes(chat_tokenizer, check_segments):
    begin = chat_tokenizer.convert_tokens_to_ids("<s>")
    processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    chat_tokenizer.backend_tokenizer.post_processor = processor
    dataset = TaskDataset([{"prompt": "p", "completion": "c"}], "instruction", chat_tokenizer)
    prompt = f"{SYSTEM}<|im_start|>user\np<|im_end|>\n<|im_start|>assistant\n"
    check_segments(dataset[0], chat_tokenizer, [(prompt, False), ("c<|im_end|>", True), ("\n", False)])
    assert begin not in dataset[0]["input_ids"]


def test_a_system_message_replaces_the_template_own(chat_tokenizer, check_segments):
    dataset = TaskDataset([{"instruction": "i", "output": "o", "system": "Be brief."}], "instruction", chat_tokenizer)
    prompt = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\ni<|im_end|>\n<|im_start|>assistant\n"
    check_segments(dataset[0], chat_tokenizer, [(prompt, False), ("o<|im_end|>", True), ("\n", False)])


def test_every_answer_of_a_conversation_is_learnt(chat_tokenizer, check_segments):
    # answers that repeat a question, are empty, or end in white space
    dataset = ChatDataset([conversation("yes", "yes", "no", "", "go", "ok \n", "bye")], chat_tokenizer)
    segments = [(SYSTEM, False)]
    for question, answer in (("yes", "yes"), ("no", ""), ("go", "ok \n")):
        segments += [
            (f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n", False),
            (f"{answer}<|im_end|>", True),
            ("\n", False),
        ]
    check_segments(dataset[0], chat_tokenizer, [*segments, ("<|im_start|>user\nbye<|im_end|>\n", False)])
    ((prompt, reference),) = dataset.generation_pairs(5)
    assert chat_tokenizer.decode(prompt).endswith("go<|im_end|>\n<|im_start|>assistant\n") and reference == "ok \n"


def test_ids_are_those_of_the_template_with_many_sized_tokens(bpe_tokenizer, chat_tokenizer):
    bpe_tokenizer.chat_template = chat_tokenizer.chat_template
    row = conversation("What is it?", "The quick brown fox.", "And then?", "It jumps over the lazy dog, naïvely 🦊.")
    dataset = ChatDataset([row], bpe_tokenizer)
    whole = bpe_tokenizer.apply_chat_template(row["messages"], tokenize=True)["input_ids"]
    assert dataset[0]["input_ids"] == whole
    prefix = bpe_tokenizer.apply_chat_template(row["messages"][:-1], tokenize=True, add_generation_prompt=True)
    begin = len(prefix["input_ids"])
    assert dataset[0]["labels"][begin:] == [*whole[begin:-1], -100]
    assert dataset[0]["labels"][begin - 1] == -100
    assert dataset.generation_pairs(1)[0][0] == prefix["input_ids"]


def test_response_loss_only_false_learns_every_token(chat_tokenizer, config):
    dataset = ChatDataset([conversation("a", "b"), conversation("only a question")])
    dataset.bind(chat_tokenizer, config(response_loss_only=False))
    assert len(dataset) == 2
    for index in range(2):
        assert dataset[index]["labels"] == dataset[index]["input_ids"]
    pairs = dataset.generation_pairs(5)
    assert [reference for _, reference in pairs] == ["b"]


def test_max_turns_keeps_the_system_message_and_the_last_turns(chat_tokenizer, check_segments, config):
    rows = [conversation("a", "b", "c", "d", system="s"), conversation("a", "b")]
    dataset = ChatDataset(rows)
    dataset.bind(chat_tokenizer, config(max_turns=2))
    prompt = "<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    check_segments(dataset[0], chat_tokenizer, [(prompt, False), ("d<|im_end|>", True), ("\n", False)])
    assert dataset.report.dropped_turns == 2
    assert "2 turns dropped" in str(dataset.report)
    dataset.bind(chat_tokenizer, config(max_turns=3))
    prompt = "<|im_start|>system\ns<|im_end|>\n<|im_start|>assistant\n"
    between = "\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    check_segments(
        dataset[0],
        chat_tokenizer,
        [(prompt, False), ("b<|im_end|>", True), (between, False), ("d<|im_end|>", True), ("\n", False)],
    )
    assert dataset.report.dropped_turns == 1


def test_a_template_that_refuses_an_opening_answer_loses_it_and_counts_it(chat_tokenizer, config):
    chat_tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'assistant' %}{{ raise_exception('user first') }}{% endif %}"
        + chat_tokenizer.chat_template
    )
    dataset = ChatDataset([conversation("a", "b", "c", "d")], max_turns=3)
    dataset.bind(chat_tokenizer, config())
    assert chat_tokenizer.decode(dataset[0]["input_ids"]).count("<|im_start|>") == 3  # system, c, d
    assert dataset.report.dropped_turns == 2


def test_what_a_template_refuses_is_malformed_and_named(chat_tokenizer):
    chat_tokenizer.chat_template = (
        "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
        "{% endfor %}" + chat_tokenizer.chat_template
    )
    dataset = ChatDataset([conversation("a", "b", system="s"), conversation("a", "b")], chat_tokenizer)
    assert len(dataset) == 1
    assert dataset.report.malformed == ["rows[0]: the chat template refuses it: no system role"]


def test_a_template_that_strips_and_one_without_special_tokens(tokenizer, check_segments):
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<' + m['role'] + '>' + m['content'].strip() + '</>' }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    dataset = ChatDataset([conversation("q", " a\n", "a", "r")], tokenizer)
    segments = [("<user>q</><assistant>", False), ("a</>", True), ("<user>a</><assistant>", False), ("r</>", True)]
    check_segments(dataset[0], tokenizer, segments)


def test_a_template_that_rewrites_the_last_answer(tokenizer, check_segments):
    # as reasoning models do: an empty thought before the last answer, none before earlier ones
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
        "{% if loop.last and m['role'] == 'assistant' %}<think></think>{% endif %}{{ m['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    dataset = ChatDataset([conversation("q", "a", "r", "b")], tokenizer)
    check_segments(
        dataset[0],
        tokenizer,
        [
            ("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n", False),
            ("a<|im_end|>", True),
            ("\n<|im_start|>user\nr<|im_end|>\n<|im_start|>assistant\n", False),
            ("<think></think>b<|im_end|>", True),
            ("\n", False),
        ],
    )


def test_the_end_of_a_turn_is_also_a_special_token_that_was_only_added(tokenizer, tmp_path, check_segments):
    # as Llama 3, Phi 3 and Gemma 3 are: once saved and loaded, it is none of all_special_tokens
    tokenizer.add_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert "<|end|>" not in loaded.all_special_tokens
    segments = [("<|im_start|>user\nq<|end|>\n<|im_start|>assistant\n", False), ("a<|end|>", True), ("\n", False)]
    check_segments(ChatDataset([conversation("q", "a")], loaded)[0], loaded, segments)


def test_each_turn_has_its_end_also_where_the_conversation_has_another(tokenizer, check_segments):
    # as Phi-3's template: the end-of-text token behind the last turn, unless an answer is asked for
    tokenizer.add_tokens([AddedToken("<|end|>", special=True), AddedToken("<|end|>>", special=True)])
    tokenizer.chat_template = (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}<s>{% endif %}"
    )
    dataset = ChatDataset([conversation("q", "a", "r", "b")], tokenizer)
    prompt, asked = "<|im_start|>user\nq<|end|>\n<|im_start|>assistant\n", "\n<|im_start|>user\nr<|end|>\n"
    segments = [(prompt, False), ("a<|end|>", True), (asked + "<|im_start|>assistant\n", False), ("b<|end|>", True)]
    check_segments(dataset[0], tokenizer, [*segments, ("\n<s>", False)])


@pytest.mark.parametrize(
    ("written", "date"),
    [
        ("{% set now = strftime_now('%A, %-d %B %Y') %}{{ now }}", "Friday, 26 July 2024"),
        ("{{ date_string if date_string is defined else strftime_now('%d %b %Y') }}", "26 Jul 2024"),
    ],
)
def test_a_template_that_writes_todays_date_has_a_fixed_one_in_data(chat_tokenizer, check_segments, written, date):
    # the data of a run that goes on tomorrow are the same; a conversation of today has today's
    plain = chat_tokenizer.chat_template
    chat_tokenizer.chat_template = f"{{% if true %}}{written}\n{{% endif %}}{plain}"
    dataset = ChatDataset([conversation("q", "a", system="s")], chat_tokenizer)
    prompt = f"{date}\n<|im_start|>system\ns<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
    check_segments(dataset[0], chat_tokenizer, [(prompt, False), ("a<|im_end|>", True), ("\n", False)])
    talk = chat_tokenizer.decode(chat_prompt(chat_tokenizer, [{"role": "user", "content": "q"}]))
    assert f"{datetime.now():%Y}\n" in talk


def test_a_template_that_hides_answers_is_an_error(tokenizer):
    tokenizer.chat_template = "{% for m in messages %}{{ m['role'] }}{% endfor %}"
    with pytest.raises(LLMBuilderError, match="does not show what the assistant says"):
        len(ChatDataset([conversation("a", "b")], tokenizer))


# Plain text


def test_question_answer_text_and_json_are_one(tmp_path, tokenizer):
    (tmp_path / "qa.txt").write_bytes(
        b"Question: q1?\r\nAnswer: a1\r\n\r\nQuestion: q2?\r\nAnswer: a2\r\nQuestion: q3?\r\n"
    )
    (tmp_path / "qa.jsonl").write_text("\n".join(json.dumps({"question": f"q{n}?", "answer": f"a{n}"}) for n in (1, 2)))
    from_text = TaskDataset(tmp_path / "qa.txt", "question_answering", tokenizer)
    from_json = TaskDataset(tmp_path / "qa.jsonl", "question_answering", tokenizer)
    assert [from_text[n] for n in range(2)] == [from_json[n] for n in range(2)]
    assert len(from_text) == len(from_json) == 2
    assert from_text.report.malformed == [f"{tmp_path / 'qa.txt'}:6: a question without an answer"]
    assert (from_text.report.rows, from_text.report.kept) == (3, 2)


def test_conversations_in_plain_text(tmp_path, tokenizer, check_segments, config):
    (tmp_path / "chat.txt").write_text("hi<turn>yo<turn>bye\n\nlonely\n")
    dataset = ChatDataset(tmp_path / "chat.txt")
    dataset.bind(tokenizer, config(turn_separator="<turn>"))
    check_segments(
        dataset[0],
        tokenizer,
        [("User: hi\nAssistant:", False), (" yo<|im_end|>", True), ("\nUser: bye\n", False)],
    )
    assert len(dataset) == 1
    assert dataset.report.without_targets == [f"{tmp_path / 'chat.txt'}:3: no assistant turn"]
    with pytest.raises(LLMBuilderError, match="split into turns by turn_separator, and none is set"):
        ChatDataset(tmp_path / "chat.txt").bind(tokenizer, config())


def test_text_is_no_instruction(tokenizer):
    with pytest.raises(LLMBuilderError, match="plain text, where a request and a response are expected"):
        len(TaskDataset(["some text"], "instruction", tokenizer))


# Length


def test_truncation_is_counted_and_a_lost_response_named(tokenizer, config):
    rows = [
        {"question": "q", "answer": "a" * 30},
        {"question": "q" * 50, "answer": "a"},
        {"question": "q", "answer": "a"},
    ]
    dataset = TaskDataset(rows, "question_answering")
    dataset.bind(tokenizer, config(max_seq_length=30))
    whole = tokenizer("Question: q\nAnswer: " + "a" * 30 + "<|im_end|>")["input_ids"]
    assert dataset[0]["input_ids"] == whole[:30]
    assert dataset[0]["labels"] == [-100] * 19 + whole[19:30]
    assert len(dataset) == 2
    report = dataset.report
    assert (report.rows, report.kept, report.truncated, report.tokens_lost) == (3, 2, 1, len(whole) - 30)
    assert report.without_targets == ["rows[1]: the response begins at token 68, and max_seq_length is 30"]
    assert "1 example truncated, 21 tokens lost" in str(report)


def test_the_smaller_of_two_lengths_holds(tokenizer, config):
    dataset = TaskDataset([{"question": "q", "answer": "a" * 99}], "question_answering", max_seq_length=40)
    dataset.bind(tokenizer, config(max_seq_length=1024))
    assert len(dataset[0]["input_ids"]) == 40
    dataset.bind(tokenizer, config(max_seq_length=35))
    assert len(dataset[0]["input_ids"]) == 35


def test_no_pair_is_generated_from_an_example_that_lost_its_last_answer(tokenizer, config):
    dataset = ChatDataset([conversation("a", "b", "c" * 50, "d")])
    dataset.bind(tokenizer, config(max_seq_length=40))
    assert len(dataset) == 1 and dataset.generation_pairs(3) == []


def test_nothing_left_is_an_error(tokenizer):
    with pytest.raises(LLMBuilderError, match=r"no usable example.*2 without a target: rows\[0\]: no assistant turn"):
        len(ChatDataset([conversation("q"), conversation()], tokenizer))


# Settings


def test_bad_settings():
    with pytest.raises(ConfigError, match=r"unknown task_type 'summarisation'; did you mean 'summarization'\?"):
        TaskDataset(["x"], "summarisation")
    with pytest.raises(ConfigError, match="use TextDataset"):
        TaskDataset(["x"], "language_modeling")
    with pytest.raises(ConfigError, match="max_turns must be at least 1"):
        ChatDataset(["x"], max_turns=0)


def test_the_dataset_own_settings_come_before_the_configuration(tokenizer, config):
    dataset = ChatDataset([conversation("a", "b", "c", "d")], max_turns=2, response_loss_only=False)
    dataset.bind(tokenizer, config(max_turns=4, response_loss_only=True))
    assert tokenizer.decode(dataset[0]["input_ids"]) == "User: c\nAssistant: d<|im_end|>\n"
    assert dataset[0]["labels"] == dataset[0]["input_ids"]
