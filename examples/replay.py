"""Replay: two texts one after the other; a tenth of what the second run reads are examples that the first one kept.

    llmbuilder finetune model --model runs/examples/base --dataset runs/examples/verse.txt \\
        --val-dataset runs/examples/verse-unseen.txt --continue-from runs/examples/replay-clinic \\
        --config examples/replay.yaml
"""

from prepare import base_model, text

from llmbuilder.finetune import FineTuner, FineTuningConfig

settings = {"learning_rate": 2e-3, "num_epochs": 2, "batch_size": 16, "max_seq_length": 64}
replay = {"continual_learning": True, "memory_buffer_size": 50, "replay_frequency": 0.1}
config = FineTuningConfig(**settings, **replay, output_dir="runs/examples/replay")


def learn(second, kept):
    """Learn the clinic's text, then the verse; the perplexities of both at the end."""
    first = FineTuningConfig(**settings, **kept, output_dir=f"{second.output_dir}-clinic")
    clinic = FineTuner(base_model(), text("clinic"), text("clinic-unseen"), first, overwrite=True)
    clinic.train()
    data = text("verse"), text("verse-unseen")
    verse = FineTuner(clinic.model, *data, second, overwrite=True, continue_from=clinic)
    return verse.train().final_perplexity, verse.evaluate(text("clinic-unseen")).perplexity


alone = learn(FineTuningConfig(**settings, output_dir="runs/examples/replay-without"), {})
held = learn(config, replay)
print(f"the clinic's text, after the verse was learnt (to a perplexity of {alone[0]:.2f}): perplexity {alone[1]:.2f};")
print(f"with every tenth example replayed (the verse to {held[0]:.2f}): {held[1]:.2f}")
