"""Progressive unfreezing: the last blocks learn first, and the rate follows.

    llmbuilder finetune model --model runs/examples/base --dataset runs/examples/clinic.txt \\
        --val-dataset runs/examples/clinic-unseen.txt --config examples/progressive.yaml
"""

import torch
from prepare import base_model, text

from llmbuilder.finetune import FineTuner, FineTuningConfig

config = FineTuningConfig(
    progressive_unfreezing=True,
    unfreeze_schedule=[(0, 1), (1, 2), (2, -1)],
    learning_rate_schedule=[(0, 1e-3), (1, 2e-3), (2, 3e-3)],
    batch_size=16,
    max_seq_length=64,
    output_dir="runs/examples/progressive",
)
model = base_model()
start = {name: weight.clone() for name, weight in model.named_parameters()}
tuner = FineTuner(model, text("clinic"), text("clinic-unseen"), config, overwrite=True)
results = tuner.train()
steps = {name: int(tuner.optimizer.state[weight]["step"]) for name, weight in model.named_parameters()}
blocks = [steps[f"blocks.{n}.mlp.up.weight"] for n in range(len(model.blocks))]
moved = sum(not torch.equal(start[name], weight) for name, weight in model.named_parameters())
print(
    f"steps that each block has trained for, bottom to top: {blocks}, of {results.steps}; {moved} weights moved; ",
    end="",
)
print(f"perplexity of the clinic's text {results.base_perplexity:.2f} before, {results.final_perplexity:.2f} after")
