"""L2-SP: a penalty on the distance from the base model's weights; with adapters, on the drift of the layers' weights.

    llmbuilder finetune model --model runs/examples/base --dataset runs/examples/clinic.txt \\
        --val-dataset runs/examples/clinic-unseen.txt --base-val-dataset runs/examples/everyday-unseen.txt \\
        --config examples/l2.yaml
"""

from prepare import base_model, text

from llmbuilder.finetune import FineTuner, FineTuningConfig

settings = {
    "lora_rank": 8,
    "target_modules": "all",
    "learning_rate": 1e-2,
    "num_epochs": 2,
    "batch_size": 16,
    "max_seq_length": 64,
}
config = FineTuningConfig(
    **settings,
    preserve_base_capabilities=True,
    regularization_method="l2",
    regularization_strength=0.1,
    validation_on_base_tasks=True,
    output_dir="runs/examples/l2",
)


def learn(config):
    """Learn the clinic's text; its perplexity, and by how much the loss on everyday text has risen."""
    data = {"base_val_dataset": text("everyday-unseen")}
    results = FineTuner(base_model(), text("clinic"), text("clinic-unseen"), config, overwrite=True, **data).train()
    return results.final_perplexity, results.forgetting


without = FineTuningConfig(**settings, validation_on_base_tasks=True, output_dir="runs/examples/l2-without")
alone, held = learn(without), learn(config)
print(f"learning the clinic's text (perplexity {alone[0]:.2f}) forgets {alone[1]:.2f} nats a token of everyday text;")
print(f"with L2-SP, to a perplexity of {held[0]:.2f}, {held[1]:.2f} nats")
