"""Elastic weight consolidation: learn a text while the weights that the base model depends on stay where they are.

    llmbuilder finetune model --model runs/examples/base --dataset runs/examples/clinic.txt \\
        --val-dataset runs/examples/clinic-unseen.txt --general-dataset runs/examples/everyday.txt \\
        --config examples/ewc.yaml
"""

from prepare import base_model, text

from llmbuilder.finetune import FineTuner, FineTuningConfig

settings = {"learning_rate": 2e-3, "num_epochs": 2, "batch_size": 16, "max_seq_length": 64}
config = FineTuningConfig(
    **settings,
    continual_learning=True,
    regularization_method="ewc",
    regularization_strength=300,
    output_dir="runs/examples/ewc",
)


def learn(config, **data):
    """Perplexity of the clinic's text and of everyday text after learning the clinic's."""
    tuner = FineTuner(base_model(), text("clinic"), text("clinic-unseen"), config, overwrite=True, **data)
    return tuner.train().final_perplexity, tuner.evaluate(text("everyday-unseen")).perplexity


before = FineTuner(base_model(), text("everyday"), config=FineTuningConfig()).evaluate(text("everyday-unseen"))
alone = learn(FineTuningConfig(**settings, output_dir="runs/examples/ewc-without"))
held = learn(config, general_dataset=text("everyday"))
print(f"everyday text: perplexity {before.perplexity:.2f} before; after learning the clinic's text {alone[1]:.2f}")
print(f"(the clinic's {alone[0]:.2f}), and with EWC {held[1]:.2f} (the clinic's {held[0]:.2f})")
