"""A whole fine-tuning step (forward, backward, AdamW) of a Llama-like model with every linear layer adapted, in bf16.

At p = 0 the losses of three steps must agree with PEFT's before anything is timed. Memory: the most that torch held
during a step above the model, its adapters and the optimizer's state.
"""

import torch
from layers import ALPHA, R
from stage import Stage, backend

NAME = "step"
P = 0.1


def rows(stage: Stage):
    names = ["peft", *(f"llmbuilder ({name})" for name in stage.backends())]
    wanted = losses(stage, "peft")
    for name in names[1:]:
        found = losses(stage, name)
        if max(abs(a - b) for a, b in zip(wanted, found, strict=True)) > 2e-2:
            raise SystemExit(f"losses of {name} are {found}, PEFT's {wanted}")
    steps = {name: trainer(stage, name, P)[0] for name in names}
    seconds = stage.medians(steps, repeats=20)
    batch, length = stage.pick((8, 1024), (2, 16))
    for name in names:
        yield {
            "name": name,
            "tokens": batch * length,
            "ms": f"{seconds[name] * 1e3:.2f}",
            "tokens/s": f"{batch * length / seconds[name]:.0f}",
            "peft / it": f"{seconds['peft'] / seconds[name]:.3f}",
            "working MB": stage.peak_memory(steps[name]) >> 20,
        }


def losses(stage, name):
    step, loss = trainer(stage, name, 0.0)
    found = []
    for _ in range(3):
        step()
        found.append(loss[0].item())
    return found


def trainer(stage, name, p):
    """A step, and a list that holds its loss."""
    model = llama(stage)
    torch.manual_seed(2)
    if name == "peft":
        call, context = with_peft(model, p), None
    else:
        call, context = with_ours(model, p), name.partition("(")[2][:-1]
    trained = [q for q in model.parameters() if q.requires_grad]
    torch.manual_seed(3)
    with torch.no_grad():  # the same adapters for all, none zero
        for q in sorted(trained, key=lambda q: tuple(q.shape)):
            q.copy_(torch.randn(q.shape) * 0.02)
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    batch, length = stage.pick((8, 1024), (2, 16))
    tokens = torch.randint(0, model.config.vocab_size, (batch, length)).to(stage.device)
    kept = [None]

    def step():
        with backend(context) if context else torch.enable_grad():
            optimizer.zero_grad(set_to_none=True)
            loss = call(tokens)
            loss.backward()
        optimizer.step()
        kept[0] = loss.detach()

    return step, kept


def llama(stage):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    real = {"hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 16, "num_attention_heads": 32}
    tiny = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=stage.pick(32000, 64), **stage.pick(real, tiny))
    return LlamaForCausalLM(config).to(torch.bfloat16).to(stage.device).requires_grad_(False)


def with_peft(model, p):
    import peft

    config = peft.LoraConfig(r=R, lora_alpha=ALPHA, lora_dropout=p, target_modules="all-linear", task_type="CAUSAL_LM")
    wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=False)
    return lambda tokens: wrapped(input_ids=tokens, labels=tokens).loss


def with_ours(model, p):
    from llmbuilder.nn import LoRAConfig, add_lora
    from llmbuilder.nn.heads import LanguageHead

    add_lora(model, LoRAConfig(rank=R, alpha=ALPHA, dropout=p, target_modules="all"))
    head = LanguageHead(model)

    def loss(tokens):
        mask = torch.ones_like(tokens)
        total, count = head.loss_sum({"input_ids": tokens, "labels": tokens, "attention_mask": mask})
        return total / count

    return loss
