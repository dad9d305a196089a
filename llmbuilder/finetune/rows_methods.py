"""Settings, one row each. Domains, styles, schedules, several tasks, new tokens, code."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, NonNegativeFloat, field_validator

from .rows import row

EpochSchedule = list[tuple[int, float]]
DOMAIN_WEIGHT = 0.7
CODE_TASKS = (None, "language_modeling", "code")


class MethodRows(BaseModel):
    """The other methods."""

    # Domain
    adaptation_method: Literal["domain"] | None = row(
        None,
        "`domain`: draw examples of the training data and general ones at `domain_weight` to the rest; any of the "
        "domain's settings implies it",
        "shares of the examples",
        "methods/test_domain.py",
    )
    domain: str | None = row(
        None,
        "what the domain is called",
        "results.json, name of the cached general text",
        "methods/test_domain.py",
        min_length=1,
    )
    domain_weight: float | None = row(
        None,
        f"share of the training data in the examples ({DOMAIN_WEIGHT} unless given); the rest is general",
        "shares of the examples",
        "methods/test_domain.py",
        gt=0,
        le=1,
    )
    preserve_general_knowledge: bool = row(
        False,
        "add KL(base || tuned) on the general examples, in nats a token",
        "extra_loss in metrics.jsonl, weights",
        "methods/test_distill.py",
    )
    general_tokens: int = row(
        16384,
        "most tokens of general text to sample from the base model where no general data set is given",
        "size of the general text",
        "methods/test_domain.py",
        ge=2,
    )

    # Style
    style_adaptation: bool = row(False, "train adapters on attention only", "trainable names", "methods/test_style.py")
    preserve_factual_knowledge: bool = row(
        False,
        "the feed-forward layers do not train, whatever the targets",
        "bits of the weights",
        "methods/test_style.py",
    )

    # By epoch
    progressive_unfreezing: bool = row(
        False,
        "train the last blocks first, as `unfreeze_schedule` says, and always head and final norm",
        "which weights changed in which epoch",
        "methods/test_progressive.py",
    )
    unfreeze_schedule: list[tuple[int, int]] | None = row(
        None,
        "pairs of an epoch and how many of the last blocks train from there on; -1: everything",
        "which weights changed in which epoch",
        "methods/test_progressive.py",
    )
    learning_rate_schedule: EpochSchedule | None = row(
        None,
        "pairs of an epoch and the learning rate from there on",
        "lr in metrics.jsonl",
        "methods/test_progressive.py",
    )

    # Several tasks
    multi_task: bool = row(
        False,
        "train on a MultiTaskDataset; the loss is the sum over tasks of weight times mean loss",
        "loss, gradients",
        "methods/test_multitask.py",
    )
    task_weights: dict[str, NonNegativeFloat] | None = row(
        None, "weight of each task's loss (1 unless given)", "gradients", "methods/test_multitask.py"
    )
    shared_encoder: bool = row(
        True,
        "one set of weights or one adapter for all tasks; false: an adapter a task",
        "files",
        "methods/test_multitask.py",
    )
    task_specific_heads: bool = row(
        False, "an output head a task, started from the model's", "files, gradients", "methods/test_multitask.py"
    )

    # Tokens and code
    special_tokens: list[str] | None = row(
        None,
        "tokens to add to the tokenizer; their embeddings start at the mean of the others, and train",
        "token ids, bits of the old rows",
        "methods/test_tokens.py",
    )
    code_specific_loss: bool = row(
        False,
        "weigh the loss of a token by its lexical class: punctuation and layout less than names, values and keywords",
        "gradients",
        "methods/test_code_loss.py",
    )
    syntax_aware_training: bool = row(
        False,
        "turn half of the examples into fill-in-the-middle, on the boundaries of the syntax tree",
        "examples",
        "methods/test_fim.py",
    )
    code_language: str | None = row(
        None,
        "language of the code (`python` unless given): the end of the name of an installed tree_sitter package",
        "weights and spans",
        "data/test_code.py",
        min_length=1,
    )

    @field_validator("special_tokens", mode="before")
    @classmethod
    def _one_is_a_list(cls, tokens: Any) -> Any:
        return [tokens] if isinstance(tokens, str) else tokens

    def contradictions(self) -> dict[str, bool]:
        """What is wrong, said for people, and whether it is so."""
        return {
            **_domain_contradictions(self),
            **_style_contradictions(self),
            **_schedule_contradictions(self),
            **_task_contradictions(self),
            **_code_contradictions(self),
        }

    @staticmethod
    def implied(settings: Mapping[str, Any]) -> dict[str, Any]:
        """The same settings with those that they imply, before validation."""
        given = dict(settings)
        if any(given.get(name) for name in ("domain", "domain_weight", "preserve_general_knowledge")):
            given["adaptation_method"] = given.get("adaptation_method") or "domain"
        if given.get("adaptation_method") == "domain" and given.get("domain_weight") is None:
            given["domain_weight"] = DOMAIN_WEIGHT
        style = given.get("style_adaptation") and given.get("use_lora") is not False
        if style and given.get("lora_target_modules") is None:
            given["lora_target_modules"] = "attention"
        if given.get("shared_encoder") is False and given.get("use_lora") is None:
            given["use_lora"] = True
        if (given.get("code_specific_loss") or given.get("syntax_aware_training")) and not given.get("code_language"):
            given["code_language"] = "python"
        return given | _implied_by_schedules(given)


def _implied_by_schedules(given: Mapping[str, Any]) -> dict[str, Any]:
    """The number of epochs, the first rate and a constant scheduler, where they are not given."""
    rates = given.get("learning_rate_schedule") or []
    implied: dict[str, Any] = {}
    try:
        last = max(int(entry[0]) for entry in [*rates, *(given.get("unfreeze_schedule") or [])])
        first = rates[0] if rates else (None, None)
    except (TypeError, ValueError, IndexError, KeyError):  # none, or no schedule at all: validation says so
        return implied
    implied["num_epochs"] = last + 1
    if rates:
        implied["scheduler"] = "constant"
    if first[0] == 0:
        implied["learning_rate"] = first[1]
    return {name: value for name, value in implied.items() if name not in given}


def _domain_contradictions(config: Any) -> dict[str, bool]:
    return {
        "domain_weight=1 leaves no general examples, and preserve_general_knowledge needs some: lower domain_weight": (
            config.preserve_general_knowledge and config.domain_weight == 1
        ),
        "preserve_general_knowledge looks at general examples alone, and a row of data_collator='packing' mixes them "
        "with others: drop one of them": config.preserve_general_knowledge and config.data_collator == "packing",
        f"domain={config.domain!r} names files: use letters, digits, '-', '_', '.' and spaces": (
            config.domain is not None and not all(sign.isalnum() or sign in "-_. " for sign in config.domain)
        ),
    }


def _style_contradictions(config: Any) -> dict[str, bool]:
    targets = config.lora_target_modules
    names = [targets] if isinstance(targets, str) else targets or []
    attention = all(name.split(".")[0] == "attention" for name in names)
    facts = bool(names) and all(name.split(".")[0] == "mlp" for name in names)
    extra = config.lora_config or {}
    more = [name for name in ("modules_to_save", "bias") if extra.get(name) not in (None, [], "none", "lora_only")]
    return {
        "style_adaptation trains adapters, and use_lora=False forbids them: drop one of them": (
            config.style_adaptation and not config.use_lora
        ),
        f"style_adaptation trains attention only, and target_modules={targets!r} names more: drop one of them": (
            config.style_adaptation and not attention
        ),
        f"style_adaptation trains attention only, and lora_config's {' and '.join(more)} would train more: leave out": (
            config.style_adaptation and bool(more)
        ),
        f"preserve_factual_knowledge leaves target_modules={targets!r} nothing to train: name other modules": (
            config.preserve_factual_knowledge and facts
        ),
    }


def _schedule_contradictions(config: Any) -> dict[str, bool]:
    found: dict[str, bool] = {
        "progressive_unfreezing needs an unfreeze_schedule, pairs of an epoch and a number of blocks": (
            config.progressive_unfreezing and config.unfreeze_schedule is None
        ),
        "unfreeze_schedule has no effect without progressive_unfreezing=True": (
            not config.progressive_unfreezing and config.unfreeze_schedule is not None
        ),
        f"learning_rate_schedule sets the rate, and scheduler='{config.scheduler}' would change it: drop one of them": (
            config.learning_rate_schedule is not None and config.scheduler != "constant"
        ),
    }
    for name in ("unfreeze_schedule", "learning_rate_schedule"):
        schedule = getattr(config, name)
        if schedule is None:
            continue
        epochs = [epoch for epoch, _ in schedule]
        found |= {
            f"{name} is empty: leave it out, or give pairs": not schedule,
            f"{name} is out of order: its epochs {epochs} should rise from 0 on": (
                epochs != sorted(set(epochs)) or min(epochs, default=0) < 0
            ),
            f"{name} has an entry for epoch {max(epochs, default=0)}, and num_epochs={config.num_epochs} ends before": (
                max(epochs, default=0) >= config.num_epochs
            ),
        }
    blocks = config.unfreeze_schedule or []
    counts = [float("inf") if count == -1 else count for _, count in blocks]
    rates = config.learning_rate_schedule or []
    return found | {
        "unfreeze_schedule should say what trains from epoch 0 on": bool(blocks) and blocks[0][0] > 0,
        f"unfreeze_schedule={blocks} should count blocks from 0, or -1 for everything": any(n < -1 for _, n in blocks),
        f"unfreeze_schedule={blocks} is out of order: it should free more blocks from entry to entry": (
            counts != sorted(set(counts))
        ),
        "learning_rate_schedule should hold positive rates": any(rate <= 0 for _, rate in rates),
        f"learning_rate={config.learning_rate} has no effect beside learning_rate_schedule={rates}: drop one of them": (
            bool(rates) and rates[0][0] == 0 and rates[0][1] != config.learning_rate
        ),
    }


def _task_contradictions(config: Any) -> dict[str, bool]:
    other = [
        name
        for name, given in {
            "task_weights": config.task_weights is not None,
            "shared_encoder=False": not config.shared_encoder,
            "task_specific_heads": config.task_specific_heads,
        }.items()
        if given
    ]
    apart = not config.shared_encoder
    return {
        f"{', '.join(other)} have no effect without multi_task=True": bool(other) and not config.multi_task,
        "shared_encoder=False gives each task an adapter, and use_lora=False forbids them: drop one of them": (
            apart and not config.use_lora
        ),
        "multi_task and data_collator='packing': a packed row holds examples of several tasks; drop one of them": (
            config.multi_task and config.data_collator == "packing"
        ),
        "shared_encoder=False: general examples belong to no task, and would train no adapter; drop the domain": (
            apart and config.adaptation_method is not None
        ),
    }


def _code_contradictions(config: Any) -> dict[str, bool]:
    code = [name for name in ("code_specific_loss", "syntax_aware_training") if getattr(config, name)]
    tokens = config.special_tokens or []
    targets = config.lora_target_modules
    embeddings = "embeddings" in ([targets] if isinstance(targets, str) else targets or [])
    new = "special_tokens" if tokens else "syntax_aware_training" if config.syntax_aware_training else ""
    rows = bool((config.lora_config or {}).get("trainable_token_indices"))
    return {
        "code_language has no effect without code_specific_loss or syntax_aware_training": (
            config.code_language is not None and not code
        ),
        f"{' and '.join(code)} read code, and task_type='{config.task_type}' brings other text: drop one of them": (
            bool(code) and (config.task_type not in CODE_TASKS or config.dialogue_format)
        ),
        "special_tokens should name tokens, each once, none of them empty": (
            config.special_tokens is not None and (not tokens or len(set(tokens)) < len(tokens) or not all(tokens))
        ),
        f"{new} adds rows to the embeddings, and freeze_embeddings keeps them from learning: drop one of them": (
            bool(new) and config.freeze_embeddings
        ),
        "trainable_token_indices are rows of the embeddings, and freeze_embeddings keeps them from learning: drop one "
        "of them": rows and config.freeze_embeddings,
        f"{new} trains new rows of the embeddings, and an adapter on all rows would change the old ones: "
        "leave 'embeddings' out of target_modules": bool(new) and embeddings,
    }
