"""A whole fine-tuning step (forward, backward, AdamW) of a 124 M Llama-like model with every linear layer adapted.

Floors: ahead of PEFT as installed by 2x in fp32 and 1.6x in bf16, with at most 0.55x its working memory above the
model. Each competitor runs in a process of its own; they step in turn. Before any figure: at p=0 the losses of 5 steps
and the norms of every gradient in them must agree with the first competitor's. Working memory = peak resident set of
three steps less that with model, adapters and optimizer built. A further competitor is one entry in COMPETITORS.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import time

from harness import environment, malloc_mode, median_ratio, write

R, ALPHA, P, BATCH, SEQ = 16, 32, 0.1, 8, 256
# losses, absolute; gradient norms, relative
LIMIT = {"fp32": (1e-4, 2e-3), "fp32-medium": (1e-4, 2e-3), "bf16": (2e-2, 1e-1)}
FLOOR = {"fp32": 2.0, "bf16": 1.6}


def peft_model(model, p, **options):
    import peft

    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=p, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(model, config, **options)
    return model, lambda tokens: model(input_ids=tokens, labels=tokens).loss


def peft_low(model, p):
    """PEFT with adapters in the model's own dtype (its default keeps them in fp32)."""
    return peft_model(model, p, autocast_adapter_dtype=False)


def llmbuilder(model, p):
    """Adapters, and the loss by blocks as the tuner computes it."""
    import torch

    from llmbuilder.nn import LoRAConfig, add_lora
    from llmbuilder.nn.heads import LanguageHead

    add_lora(model, LoRAConfig(rank=R, alpha=ALPHA, dropout=p, target_modules="all"))
    head = LanguageHead(model)

    def loss(tokens):
        total, count = head.loss_sum({"input_ids": tokens, "labels": tokens, "attention_mask": torch.ones_like(tokens)})
        return total / count

    return model, loss


COMPETITORS = {"peft": peft_model, "peft (bf16 adapters)": peft_low, "llmbuilder": llmbuilder}
NAMES = {
    "fp32": ["peft", "llmbuilder"],
    "fp32-medium": ["peft"],
    "bf16": ["peft", "peft (bf16 adapters)", "llmbuilder"],
}


def build(name, mode, p):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_float32_matmul_precision("medium" if mode == "fp32-medium" else "highest")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=768,
        intermediate_size=2560,
        num_hidden_layers=12,
        num_attention_heads=12,
        num_key_value_heads=12,
        tie_word_embeddings=True,
        max_position_embeddings=2048,
        use_cache=False,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16 if mode == "bf16" else torch.float32)
    parameters = sum(q.numel() for q in model.parameters())
    model, loss_of = COMPETITORS[name](model, p)
    trained = [q for q in model.parameters() if q.requires_grad]
    assert len(trained) == 2 * 7 * config.num_hidden_layers, f"{name} trains {len(trained)} tensors"
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for a, b in zip(trained[::2], trained[1::2], strict=True):
            assert a.shape[0] == b.shape[1] == R, name
            a.copy_(torch.randn(a.shape, generator=generator) * a.shape[1] ** -0.5)
            b.copy_(torch.randn(b.shape, generator=generator) * 0.02)
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    tokens = torch.randint(100, (5, BATCH, SEQ), generator=generator)  # of a few kinds, so that the loss falls
    model.train()

    def step(i):
        start = time.perf_counter()
        loss = loss_of(tokens[i % 5])
        loss.backward()
        norms = [q.grad.norm().item() for q in trained] if p == 0 else []
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"seconds": time.perf_counter() - start, "loss": loss.item(), "norms": norms}

    return step, parameters


def status(field):
    """A field of /proc/self/status in MB."""
    with open("/proc/self/status") as file:
        return int(re.search(rf"{field}:\s+(\d+)", file.read())[1]) / 1024


def worker(name, mode, p):
    """One step for each line on standard input, one line of JSON for each step."""
    step, parameters = build(name, mode, p)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # peak := now
    print(json.dumps({"parameters": parameters}), flush=True)
    for i, _ in enumerate(sys.stdin):
        print(json.dumps({**step(i), "memory": status("VmHWM") - before}), flush=True)


class Worker:
    def __init__(self, name, mode, p, malloc):
        command = [sys.executable, __file__, "--worker", name, "--mode", mode, "--p", str(p)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment(malloc)
        )
        self.about = self.read()

    def read(self):
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"worker ended: {self.process.wait()}")
        return json.loads(line)

    def step(self):
        self.process.stdin.write("step\n")
        self.process.stdin.flush()
        return self.read()

    def close(self):
        self.process.stdin.close()
        self.process.wait()


def steps(name, mode, p, count, malloc="system"):
    w = Worker(name, mode, p, malloc)
    results = [w.step() for _ in range(count)]
    w.close()
    return results


def check(names, mode):
    """The same training at p=0, or nothing is measured."""
    want = steps(names[0], mode, 0.0, 5)
    for name in names[1:]:
        got = steps(name, mode, 0.0, 5)
        loss = max(abs(g["loss"] - w["loss"]) for g, w in zip(got, want, strict=True))
        norms = [
            abs(g - w) / w for a, b in zip(got, want, strict=True) for g, w in zip(a["norms"], b["norms"], strict=True)
        ]
        print(
            f"{mode}, p=0: losses of {name} differ by at most {loss:.1e}, gradient norms by {max(norms):.1e}",
            flush=True,
        )
        if not (loss <= LIMIT[mode][0] and max(norms) <= LIMIT[mode][1]):
            raise SystemExit(f"{name} does not train as {names[0]} does: nothing measured")


def measure(competitors, repeats):
    """[(mode, name)] stepping in turn -> a result row each, ratios against the first."""
    memory = {c: steps(c[1], c[0], P, 3)[-1]["memory"] for c in competitors}
    workers = {c: Worker(c[1], c[0], P, malloc_mode()) for c in competitors}
    runs = {c: [] for c in competitors}
    for i in range(repeats + 1):
        for c in competitors:
            result = workers[c].step()
            if i:  # the first is warm-up
                runs[c].append(result)
    for w in workers.values():
        w.close()
    first = competitors[0]
    seconds = {c: [r["seconds"] for r in runs[c]] for c in competitors}
    return [
        {
            "dtype": c[0],
            "name": c[1],
            "parameters": workers[c].about["parameters"],
            "tokens": f"{BATCH}x{SEQ}",
            "seconds": f"{statistics.median(seconds[c]):.3f}",
            "peft / it": f"{median_ratio(seconds[first], seconds[c]):.2f}",
            "working MB": f"{memory[c]:.0f}",
            "of peft's": f"{memory[c] / memory[first]:.2f}",
            "last loss": f"{runs[c][-1]['loss']:.4f}",
        }
        for c in competitors
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--worker")
    parser.add_argument("--mode")
    parser.add_argument("--p", type=float)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.mode, args.p)
    for mode in ("fp32", "bf16"):
        check(NAMES[mode], mode)
    rows = measure([("fp32", "peft"), ("fp32", "llmbuilder"), ("fp32-medium", "peft")], args.repeats)
    rows += measure([("bf16", name) for name in NAMES["bf16"]], args.repeats)
    write("step", rows)


if __name__ == "__main__":
    main()
