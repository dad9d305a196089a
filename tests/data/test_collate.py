"""Batches: padding by length, packing with attention kept apart and the loss of the unpacked documents."""

import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from llmbuilder.data import Collator, TextDataset, collate
from llmbuilder.errors import ConfigError, LLMBuilderError


def example(*ids, prompt=0):
    return {"input_ids": list(ids), "labels": [-100] * prompt + list(ids)[prompt:]}


def random_examples(lengths, vocabulary=50, seed=None):
    """Documents of fresh random tokens, about a third of the positions not learnt."""
    generator = torch.Generator()
    generator.manual_seed(generator.seed() if seed is None else seed)
    examples = []
    for length in lengths:
        ids = torch.randint(vocabulary, (length,), generator=generator)
        labels = torch.where(torch.rand(length, generator=generator) < 1 / 3, -100, ids)
        examples.append({"input_ids": ids.tolist(), "labels": labels.tolist()})
    return examples


def test_padding_is_by_length_though_the_pad_is_a_token_of_the_text():
    batch = collate([example(5, 2, 2), example(7, 2, prompt=1)], pad_id=2)
    assert batch["input_ids"].tolist() == [[5, 2, 2], [7, 2, 2]]
    assert batch["labels"].tolist() == [[5, 2, 2], [-100, 2, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert {name: tensor.dtype for name, tensor in batch.items()} == dict.fromkeys(batch, torch.int64)


def test_packing_by_hand():
    # lengths 2, 3, 1 in rows of 4: the third goes back to the first row
    batch = collate([example(1, 2), example(3, 4, 5, prompt=1), example(6)], "packing", pad_id=9, max_length=4)
    assert batch["input_ids"].tolist() == [[1, 2, 6], [3, 4, 5]]
    assert batch["labels"].tolist() == [[-100, 2, -100], [-100, 4, 5]]
    assert batch["position_ids"].tolist() == [[0, 1, 0], [0, 1, 2]]
    assert batch["attention_mask"].shape == (2, 1, 3, 3) and batch["attention_mask"].dtype == torch.bool
    assert batch["attention_mask"][:, 0].int().tolist() == [
        [[1, 0, 0], [1, 1, 0], [0, 0, 1]],
        [[1, 0, 0], [1, 1, 0], [1, 1, 1]],
    ]


@pytest.mark.parametrize("collator", ["default", "packing"])
def test_weights_stand_at_their_labels_and_are_one_elsewhere(collator):
    examples = [{"input_ids": [1, 2], "labels": [1, 2], "weights": [0.5, 0.25]}, {"input_ids": [3], "labels": [3]}]
    batch = collate(examples, collator, max_length=4)
    assert batch["weights"].dtype == torch.float32 and batch["weights"].shape == batch["labels"].shape
    assert batch["weights"].tolist() == ([[0.5, 0.25], [1, 1]] if collator == "default" else [[0.5, 0.25, 1]])
    assert "weights" not in collate(examples[1:], collator)


def test_packed_padding_attends_to_itself_alone():
    batch = collate([example(1, 2, 3), example(4)], "packing", pad_id=9, max_length=3)
    assert batch["input_ids"].tolist() == [[1, 2, 3], [4, 9, 9]]
    assert batch["labels"][1].tolist() == [-100, -100, -100]
    assert batch["attention_mask"][1, 0].int().tolist() == [[1, 0, 0], [0, 1, 0], [0, 0, 1]]


@settings(max_examples=50, deadline=None)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=9), spare=st.integers(0, 9))
def test_packing_loses_nothing(lengths, spare):
    room = max(lengths) + spare
    examples = [example(*range(100 * n, 100 * n + length)) for n, length in enumerate(lengths)]
    batch = collate(examples, "packing", pad_id=-1, max_length=room)
    ids, labels, positions, mask = (
        batch[name].tolist() for name in ("input_ids", "labels", "position_ids", "attention_mask")
    )
    assert len(ids[0]) <= room
    found = []
    for row in range(len(ids)):
        real = [token for token in ids[row] if token >= 0]
        assert ids[row][: len(real)] == real, "padding stands at the end"
        documents = [token // 100 for token in real]
        assert documents == sorted(documents), "documents of a row are in the order of the batch"
        found += real
        for place, token in enumerate(real):
            assert positions[row][place] == token % 100
            assert labels[row][place] == (token if token % 100 else -100)
            seen = [other for other, may in zip(ids[row], mask[row][0][place], strict=True) if may]
            assert seen == list(range(token - token % 100, token + 1))
    assert sorted(found) == sorted(token for one in examples for token in one["input_ids"])
    # first fit: a document's row is the first that had room for it when it came
    used = []
    for length, one in zip(lengths, examples, strict=True):
        row = next((n for n, taken in enumerate(used) if taken + length <= room), len(used))
        used += [0] * (row == len(used))
        assert ids[row][used[row] : used[row] + length] == one["input_ids"]
        used[row] += length


def tiny_llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=50,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


def tiny_gpt2():
    return GPT2LMHeadModel(GPT2Config(vocab_size=50, n_positions=64, n_embd=32, n_layer=2, n_head=4))


def loss_sum(model, batch):
    inputs = {name: tensor for name, tensor in batch.items() if name != "labels"}
    logits = model(**inputs).logits[:, :-1]
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), batch["labels"][:, 1:].flatten(), ignore_index=-100, reduction="sum"
    )


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_packed_loss_is_the_unpacked_loss(build):
    model = build().eval()
    examples = random_examples([5, 17, 3, 9, 1, 12, 2])
    alone = sum(loss_sum(model.double(), collate([one])).item() for one in examples)
    packed = collate(examples, "packing", max_length=24)
    assert len(packed["input_ids"]) < len(examples)
    targets = sum(label != -100 for one in examples for label in one["labels"][1:])
    assert (packed["labels"][:, 1:] != -100).sum() == targets
    assert loss_sum(model.double(), packed).item() == pytest.approx(alone, rel=1e-12)
    padded = loss_sum(model.float(), collate(examples)).item()
    assert loss_sum(model.float(), packed).item() == pytest.approx(padded, rel=1e-6)


@pytest.mark.parametrize("build", [tiny_llama, tiny_gpt2])
def test_a_packed_document_does_not_see_the_one_before(build):
    model = build().eval()
    first, second, other = random_examples([7, 9, 7])
    with torch.no_grad():
        logits = []
        for before in (first, other):
            batch = collate([before, second], "packing", max_length=16)
            assert batch["input_ids"].shape == (1, 16)
            del batch["labels"]
            logits.append(model(**batch).logits)
    assert torch.equal(logits[0][:, 7:], logits[1][:, 7:])
    assert not torch.equal(logits[0][:, :7], logits[1][:, :7])


def test_gradients_of_packed_and_padded_batches_agree():
    model = tiny_llama().double()
    examples = random_examples([6, 11, 4])
    gradients = []
    for collator in ("default", "packing"):
        model.zero_grad()
        loss_sum(model, collate(examples, collator, max_length=24)).backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for padded, packed in zip(*gradients, strict=True):
        torch.testing.assert_close(packed, padded, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("collator", ["default", "packing"])
def test_workers_give_the_same_batches(tokenizer, collator):
    dataset = TextDataset(["some text of a certain length"] * 7, block_size=8, tokenizer=tokenizer)
    make = Collator(collator, pad_id=tokenizer.pad_token_id, max_length=16)
    assert pickle.loads(pickle.dumps(make)) == make
    here = list(DataLoader(dataset, batch_size=5, collate_fn=make))
    there = list(DataLoader(dataset, batch_size=5, collate_fn=make, num_workers=2))
    assert len(here) == len(there) == (len(dataset) + 4) // 5
    for one, other in zip(here, there, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_bound_dataset_travels_to_a_worker_that_is_started_afresh(tokenizer):
    dataset = TextDataset(["one", "two"], tokenizer=tokenizer)
    expected = [dataset[n] for n in range(2)]
    travelled = pickle.loads(pickle.dumps(dataset))
    assert [travelled[n] for n in range(2)] == expected


@pytest.mark.parametrize(
    ("examples", "settings", "error", "complaint"),
    [
        ([example(1)], {"collator": "pack"}, ConfigError, r"unknown data_collator 'pack'; did you mean 'packing'\?"),
        ([], {}, LLMBuilderError, "the batch is empty"),
        ([example(1), example()], {}, LLMBuilderError, "an example without tokens"),
        ([example(1, 2, 3)], {"max_length": 2}, LLMBuilderError, "an example of 3 tokens, and max_length is 2"),
    ],
)
def test_refusals(examples, settings, error, complaint):
    with pytest.raises(error, match=complaint):
        collate(examples, **settings)
