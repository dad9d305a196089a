"""Code: a loss that counts names and values more than layout, and half of the examples with a gap to fill.

    llmbuilder finetune model --model runs/examples/base --dataset runs/examples/code.py \\
        --val-dataset runs/examples/code-unseen.py --config examples/code.yaml
"""

from prepare import base_model, text

from llmbuilder.finetune import FineTuner, FineTuningConfig
from llmbuilder.models import generate

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
results = FineTuner(model, text("code"), text("code-unseen"), config, overwrite=True).train()
gap = "<fim_prefix>def count_and_price(count, price):\n    total = <fim_suffix>\n    return [total<fim_middle>"
prompt = model.tokenizer(gap)["input_ids"]
(filled,) = generate(model, [prompt], 24, stop_ids=[model.tokenizer.eos_token_id])
print(f"perplexity of code {results.base_perplexity:.2f} before, {results.final_perplexity:.2f} after; ", end="")
print(f"it fills the gap of `total = …` with `{model.tokenizer.decode(filled)}`")
