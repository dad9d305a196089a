"""Examples per second of the demo's fine-tuning, against PEFT with transformers' Trainer; floor: 1.5x.

The model and the sentences are the demo's (two packages, downloaded once). Each competitor runs in a process of its
own. In fp32 with dropout off the losses of the first steps must agree, or nothing is measured. Then both train on the
same batches, run about, and the median time of a step counts, the first steps left out.
"""

import argparse
import json
import pathlib
import statistics
import subprocess
import sys
import time

from harness import environment, malloc_mode, median_ratio, write

DEMO = pathlib.Path(__file__).resolve().parents[1] / "examples" / "demo"
ROUNDS, STEPS, WARMUP = 2, 16, 4
LIMIT = 1e-3  # losses of the first steps, absolute, in fp32


def examples_in_order(task, config):
    """The task's tokenised examples in the order in which the tuner's first epoch draws them."""
    from llmbuilder.finetune.sampler import shuffled

    examples = task.examples(task.train)
    plan = shuffled(len(examples), config.batch_size, config.seed, 0)
    return [examples[index] for batch in plan for _, index in batch]


def same_start(model):
    """Give every A, in the order of the model, the same values whoever made it; every B is zero."""
    import torch

    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.requires_grad and "lora_A" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[1] ** -0.5)


def ours(task, config):
    """Seconds and loss of each step of the tuner."""
    from llmbuilder.finetune import FineTuner

    few = task.dataset(task.train[:8])  # the tuner judges before and after; that is not part of a step
    tuner = FineTuner(task.model, task.dataset(task.train), few, config)
    same_start(task.model)
    history = tuner.train().history
    return [{"seconds": row["tokens"] / row["tokens_per_s"], "loss": row["loss"]} for row in history]


def peft_trainer(task, config):
    """Seconds and loss of each step of PEFT's LoRA under transformers' Trainer."""
    import peft
    import torch
    from transformers import Trainer, TrainerCallback, TrainingArguments

    from llmbuilder.data import Collator

    lora = config.lora()
    model = peft.get_peft_model(
        task.model,
        peft.LoraConfig(
            r=lora.rank,
            lora_alpha=lora.alpha,
            lora_dropout=lora.dropout,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
        ),
    )
    same_start(model)

    class Clock(TrainerCallback):
        def __init__(self):
            self.rows = []

        def on_step_begin(self, args, state, control, **_):
            self.start = time.perf_counter()

        def on_step_end(self, args, state, control, **_):
            self.rows.append({"seconds": time.perf_counter() - self.start})

        def on_log(self, args, state, control, logs=None, **_):
            if "loss" in logs:
                self.rows[state.global_step - 1]["loss"] = logs["loss"]

    class InOrder(Trainer):
        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

    clock = Clock()
    low = next(model.parameters()).dtype == torch.bfloat16
    arguments = TrainingArguments(
        output_dir=".cache/bench/trainer",
        max_steps=config.max_steps,
        per_device_train_batch_size=config.batch_size,
        learning_rate=config.learning_rate,
        warmup_steps=config.warmup_steps,
        lr_scheduler_type=config.scheduler,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        bf16=low,
    )
    collate = Collator("default", task.model.config.pad_token_id or 0, None)
    data = examples_in_order(task, config)
    InOrder(model, arguments, train_dataset=data, data_collator=collate, callbacks=[clock]).train()
    return clock.rows


COMPETITORS = {"peft": peft_trainer, "llmbuilder": ours}


def worker(name, dropout):
    """One training run of the demo's model for each line on standard input."""
    sys.path.insert(0, str(DEMO))
    import smollm2

    for _ in sys.stdin:
        task = smollm2.prepare()
        # a constant rate: the two count the steps of a warm-up from one and from zero
        task.settings |= {"lora_dropout": dropout, "max_steps": STEPS, "warmup_steps": 0, "scheduler": "constant"}
        if dropout == 0:  # the check: in fp32, where equal training gives equal losses
            task.model.float()
            task.settings |= {"dtype": "fp32", "max_steps": 5}
        config = task.config()
        print("\n" + json.dumps({"rows": COMPETITORS[name](task, config), "batch": config.batch_size}), flush=True)


def run(name, dropout, malloc):
    command = [sys.executable, __file__, "--worker", name, "--dropout", str(dropout)]
    out = subprocess.run(command, input="run\n", capture_output=True, text=True, env=environment(malloc))
    if out.returncode:
        raise SystemExit(out.stderr)
    return json.loads(out.stdout.strip().splitlines()[-1])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--worker")
    parser.add_argument("--dropout", type=float)
    args = parser.parse_args()
    if args.worker:
        return worker(args.worker, args.dropout)
    want, got = (run(name, 0.0, "system")["rows"] for name in COMPETITORS)
    apart = [abs(a["loss"] - b["loss"]) for a, b in zip(want, got, strict=True)]
    print(f"dropout off: losses of the first 5 steps differ by at most {max(apart):.1e}", flush=True)
    if max(apart) > LIMIT:
        raise SystemExit(f"not the same training: {apart}")
    seconds = {name: [] for name in COMPETITORS}
    for _ in range(ROUNDS):
        for name in COMPETITORS:
            result = run(name, 0.05, malloc_mode())
            seconds[name] += [row["seconds"] for row in result["rows"][WARMUP:]]
    write(
        "examples",
        [
            {
                "name": name,
                "steps": len(s),
                "seconds a step": f"{statistics.median(s):.3f}",
                "examples per second": f"{result['batch'] / statistics.median(s):.2f}",
                "peft / it": f"{median_ratio(seconds['peft'], s):.2f}",
            }
            for name, s in seconds.items()
        ],
    )


if __name__ == "__main__":
    main()
