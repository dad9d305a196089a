"""Code: a loss that counts names and values more than layout, and half of the examples with a gap to fill.

    llmbuilder finetune model --model runs/examples/base --dataset runs/examples/code.py \\
        --val-dataset runs/examples/code-unseen.py --config examples/code.yaml
"""

from prepare import base_model, text

from llmbuilder.finetune import FineTuner, FineTuningConfig

config = FineTuningConfig(
    code_specific_loss=True,
    syntax_aware_training=True,
    learning_rate=4e-3,
    num_epochs=6,
    batch_size=16,
    max_seq_length=128,
    output_dir="runs/examples/code",
)
model = base_model()
tuner = FineTuner(model, text("code"), text("code-unseen"), config, overwrite=True)
results = tuner.train()
examples = [tuner.run.sources["train"][index] for index in range(len(tuner.run.sources["train"]))]
first = model.tokenizer.convert_tokens_to_ids("<fim_prefix>")
gaps = [example for example in examples if example["input_ids"][0] == first]
weights = sorted({round(weight, 2) for example in examples for weight in example["weights"]})
print(f"perplexity of code {results.base_perplexity:.2f} before, {results.final_perplexity:.2f} after; ", end="")
print(f"{len(gaps)} of {len(examples)} examples had a gap to fill; targets weighed {weights}, layout least")
