"""The diagonal Fisher information from one backward pass a batch, against one backward pass an example.

Both must give the same to fp32 rounding (checked), and the batched way must not be slower at any size of the table. The
baseline is the usual loop: forward and backward of one example, without padding, then `F += g**2` over all weights.
"""

import pathlib
import random
import statistics
import sys

import torch
from torch.nn import functional as F

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
from harness import interleaved, median_ratio, relative, write

from llmbuilder.data import collate
from llmbuilder.methods.ewc import batches_of, beginnings
from llmbuilder.methods.fisher import diagonal_fisher, language_scores
from llmbuilder.models import GPT, GPTConfig
from llmbuilder.nn import LoRAConfig, add_lora

# name: layers, width, vocabulary, tied, tokens of the longest example, examples, adapters
SIZES = {
    "tiny": (2, 64, 512, False, 16, 128, False),
    "small": (4, 128, 2048, False, 64, 64, False),
    "small, tied": (4, 128, 2048, True, 64, 64, False),
    "small, long": (4, 128, 2048, False, 512, 32, False),
    "wide": (2, 768, 8192, False, 32, 32, False),
    "wide, long": (2, 768, 8192, False, 256, 32, False),
    "large head": (1, 512, 49152, True, 64, 8, False),
    "tiny, LoRA": (2, 64, 512, False, 16, 128, True),
    "small, LoRA": (4, 128, 2048, False, 64, 64, True),
    "wide, LoRA": (2, 768, 8192, False, 128, 32, True),
}
BATCH = 8


def one_by_one(model, params, examples):
    sums = {name: torch.zeros_like(weight) for name, weight in params.items()}
    tokens = 0
    for example in examples:
        ids = torch.tensor([example["input_ids"]])
        logits = model(input_ids=ids).logits[0, :-1]
        model.zero_grad(set_to_none=True)
        F.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
        for name, weight in params.items():
            if weight.grad is not None:
                sums[name].addcmul_(weight.grad, weight.grad)
        tokens += ids.shape[1] - 1
    model.zero_grad(set_to_none=True)
    return {name: total / tokens for name, total in sums.items()}


def batched(model, params, examples):
    vocabulary = model.get_input_embeddings().num_embeddings
    parts = (collate(part) for part in batches_of(examples, BATCH, vocabulary))
    score, head = language_scores(model), model.get_output_embeddings()
    probe = collate(beginnings(examples))
    return diagonal_fisher(model, params, parts, score, empirical=True, head=head, probe=probe)


def measure(size, layers, width, vocabulary, tied, length, count, lora):
    torch.manual_seed(0)
    config = GPTConfig(vocabulary, layers, max(2, width // 64), width, block_size=length, tie_word_embeddings=tied)
    model = GPT(config).eval()
    if lora:
        add_lora(model, LoRAConfig(rank=16, target_modules="all"))
    params = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    draw = random.Random(0)
    lengths = sorted((draw.randint(max(2, length // 2), length) for _ in range(count)), reverse=True)
    texts = [[draw.randrange(vocabulary) for _ in range(n)] for n in lengths]
    examples = [{"input_ids": ids, "labels": ids} for ids in texts]
    slow, quick = one_by_one(model, params, examples), batched(model, params, examples)
    error = max(relative(quick[name], slow[name]) for name in params if slow[name].any())
    assert error < 1e-5, f"{size}: the two ways differ by {error:.1e}"
    ways = {"one by one": one_by_one, "batched": batched}
    times = interleaved({way: lambda f=f: f(model, params, examples) for way, f in ways.items()}, repeats=9)
    return [
        {
            "size": size,
            "way": way,
            "parameters": sum(weight.numel() for weight in params.values()),
            "examples": count,
            "longest": length,
            "ms": f"{statistics.median(measured) * 1e3:.2f}",
            "one by one / it": f"{median_ratio(times['one by one'], measured):.2f}",
            "largest relative difference": f"{error:.1e}",
        }
        for way, measured in times.items()
    ]


if __name__ == "__main__":
    write("fisher", [row for size, shape in SIZES.items() for row in measure(size, *shape)])
