"""Full fine-tuning: every weight learns a new kind of text.

    llmbuilder finetune model --model runs/examples/base --dataset runs/examples/clinic.txt \\
        --val-dataset runs/examples/clinic-unseen.txt --config examples/full.yaml
"""

from prepare import base_model, text

from llmbuilder.finetune import FineTuner, FineTuningConfig

config = FineTuningConfig(
    use_lora=False,
    learning_rate=2e-3,
    weight_decay=0.01,
    warmup_steps=5,
    num_epochs=2,
    batch_size=16,
    max_seq_length=64,
    output_dir="runs/examples/full",
)
tuner = FineTuner(base_model(), text("clinic"), text("clinic-unseen"), config, overwrite=True)
results = tuner.train()
trained = sum(weight.numel() for weight in tuner.trained.values())
print(f"{trained:,} weights trained; perplexity of the clinic's text {results.base_perplexity:.2f} before, ", end="")
print(f"{results.final_perplexity:.2f} after")
