"""Preserving general knowledge: while a domain is learnt, stay close to what the base model says about general text.

No general data is given here: the base model writes some itself.

    llmbuilder finetune model --model runs/examples/base --dataset runs/examples/clinic.txt \\
        --val-dataset runs/examples/clinic-unseen.txt --config examples/distill.yaml
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
    domain="clinic",
    domain_weight=0.7,
    preserve_general_knowledge=True,
    general_tokens=1024,
    output_dir="runs/examples/distill",
)


def learn(config):
    """Perplexity of the domain's text and of everyday text after learning the domain."""
    tuner = FineTuner(base_model(), text("clinic"), text("clinic-unseen"), config, overwrite=True)
    return tuner.train().final_perplexity, tuner.evaluate(text("everyday-unseen")).perplexity


alone = learn(FineTuningConfig(**settings, output_dir="runs/examples/distill-alone"))
close = learn(config)
print(
    f"perplexity of the clinic's text and of everyday text: {alone[0]:.2f} and {alone[1]:.2f} after plain LoRA, ",
    end="",
)
print(f"{close[0]:.2f} and {close[1]:.2f} after LoRA that stays close to the base model")
