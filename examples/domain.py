"""Domain adaptation: learn a domain from a mix of its text and general text, and forget less of the rest.

    llmbuilder finetune model --model runs/examples/base --dataset runs/examples/clinic.txt \\
        --val-dataset runs/examples/clinic-unseen.txt --general-dataset runs/examples/everyday.txt \\
        --config examples/domain.yaml
"""

from prepare import base_model, text

from llmbuilder.finetune import FineTuner, FineTuningConfig

settings = {"learning_rate": 2e-3, "num_epochs": 2, "batch_size": 16, "max_seq_length": 64}
config = FineTuningConfig(**settings, domain="clinic", domain_weight=0.7, output_dir="runs/examples/domain")


def learn(config, **data):
    """Perplexity of the domain's text and of everyday text after learning the domain."""
    tuner = FineTuner(base_model(), text("clinic"), text("clinic-unseen"), config, overwrite=True, **data)
    return tuner.train().final_perplexity, tuner.evaluate(text("everyday-unseen")).perplexity


before = FineTuner(base_model(), text("everyday"), config=FineTuningConfig()).evaluate(text("everyday-unseen"))
alone = learn(FineTuningConfig(**settings, output_dir="runs/examples/domain-alone"))
mixed = learn(config, general_dataset=text("everyday"))
print(
    f"everyday text: perplexity {before.perplexity:.2f} before; after learning the clinic's text alone {alone[1]:.2f}"
)
print(f"(the clinic's {alone[0]:.2f}), with 30 % everyday text in the mix {mixed[1]:.2f} (the clinic's {mixed[0]:.2f})")
