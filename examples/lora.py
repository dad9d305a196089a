"""LoRA: small adapters learn a new kind of text, the model itself stays as it is.

    llmbuilder finetune model --model runs/examples/base --dataset runs/examples/clinic.txt \\
        --val-dataset runs/examples/clinic-unseen.txt --config examples/lora.yaml
"""

from prepare import base_model, text

from llmbuilder.finetune import FineTuner, FineTuningConfig

config = FineTuningConfig(
    use_lora=True,
    lora_rank=4,
    target_modules="all",
    learning_rate=1e-2,
    num_epochs=2,
    batch_size=16,
    max_seq_length=64,
    output_dir="runs/examples/lora",
)
tuner = FineTuner(base_model(), text("clinic"), text("clinic-unseen"), config, overwrite=True)
results = tuner.train()
trained = sum(weight.numel() for weight in tuner.trained.values())
print(f"{trained:,} weights trained; perplexity of the clinic's text {results.base_perplexity:.2f} before, ", end="")
print(f"{results.final_perplexity:.2f} after")
