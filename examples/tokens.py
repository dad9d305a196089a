"""Special tokens: marks that were several tokens become one, and only their embeddings train beside the adapters.

    llmbuilder finetune model --model runs/examples/base --dataset runs/examples/code.py \\
        --val-dataset runs/examples/code-unseen.py --config examples/tokens.yaml
"""

from prepare import base_model, text

from llmbuilder.finetune import FineTuner, FineTuningConfig

config = FineTuningConfig(
    special_tokens=["def ", "    return "],
    lora_rank=8,
    target_modules="all",
    learning_rate=1e-2,
    num_epochs=2,
    batch_size=16,
    max_seq_length=64,
    output_dir="runs/examples/tokens",
)
model = base_model()
code, unseen = text("code"), text("code-unseen")
unseen.bind(model.tokenizer, config)
length = unseen.report.tokens
results = FineTuner(model, code, unseen, config, overwrite=True).train()
rows = next(weight for name, weight in model.named_parameters() if name.endswith(".rows"))
print(f"the same text is {length:,} tokens before and {unseen.report.tokens:,} after; {len(rows)} rows of the ", end="")
print(f"embedding train; perplexity {results.base_perplexity:.2f} before, {results.final_perplexity:.2f} after")
