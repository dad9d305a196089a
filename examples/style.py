"""Style: adapters on attention alone learn to speak in another way; where facts are stored nothing changes.

    llmbuilder finetune model --model runs/examples/base --dataset runs/examples/verse.txt \\
        --val-dataset runs/examples/verse-unseen.txt --config examples/style.yaml
"""

import torch
from prepare import base_model, text

from llmbuilder.finetune import FineTuner, FineTuningConfig

config = FineTuningConfig(
    style_adaptation=True,
    lora_rank=8,
    learning_rate=1e-2,
    num_epochs=2,
    batch_size=16,
    max_seq_length=64,
    output_dir="runs/examples/style",
)
model = base_model()
facts = {name: weight.clone() for name, weight in model.named_parameters() if ".mlp." in name}
results = FineTuner(model, text("verse"), text("verse-unseen"), config, overwrite=True).train()
weights = dict(model.named_parameters())
same = all(torch.equal(weights[name], weight) for name, weight in facts.items())
print(f"perplexity of verse {results.base_perplexity:.2f} before, {results.final_perplexity:.2f} after; ", end="")
print(f"all {len(facts)} feed-forward weights have the bits they had: {same}")
