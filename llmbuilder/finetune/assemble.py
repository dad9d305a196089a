"""From settings to methods."""

import warnings
from typing import Any

from ..errors import ConfigError
from ..methods import (
    EWC,
    L2,
    BaseTask,
    CodeLoss,
    Domain,
    FactualKnowledge,
    FillInTheMiddle,
    Freeze,
    Full,
    General,
    GeneralKnowledge,
    LoRA,
    MultiTask,
    Progressive,
    Replay,
    SpecialTokens,
    Style,
    TaskAdapters,
)
from .config import FineTuningConfig
from .past import Past


def make_methods(config: FineTuningConfig, past: Past | None = None, base_val: bool = False) -> list[Any]:
    """The methods that the settings ask for, in the order of their hooks.

    Args:
        config: the settings.
        past: what a run that goes on knows.
        base_val: there are data that the model is judged by before and after.
    """
    lora = config.lora()
    methods: list[Any] = []
    if needs_general(config, past or Past(), base_val):
        methods.append(General(config.general_tokens, config.max_seq_length, config.domain))
    make_adapted = LoRA if config.shared_encoder else TaskAdapters
    adapted = None if lora is None else make_adapted(lora)
    if config.style_adaptation and lora is not None:
        methods.append(Style(lora.target_modules))
    if config.special_tokens:
        methods.append(SpecialTokens(config.special_tokens, adapted))
    methods.append(adapted or Full(config.dropout_rate))
    if config.freeze_layers or config.freeze_embeddings:
        methods.append(Freeze(config.freeze_layers, config.freeze_embeddings))
    if config.preserve_factual_knowledge:
        if config.style_adaptation:
            warnings.warn("style_adaptation trains attention only: preserve_factual_knowledge is implied", stacklevel=3)
        methods.append(FactualKnowledge())
    if config.multi_task:
        weights = config.task_weights or {}
        methods.append(MultiTask(weights, config.task_specific_heads, adapters=not config.shared_encoder))
    if config.unfreeze_schedule:
        methods.append(Progressive(config.unfreeze_schedule))
    if config.syntax_aware_training:
        methods.append(FillInTheMiddle(config.code_language or "", config.max_seq_length, adapted))
    if config.code_specific_loss:
        methods.append(CodeLoss(config.code_language or ""))
    if config.domain_weight is not None:
        methods.append(Domain(config.domain_weight, config.domain))
    if config.preserve_general_knowledge:
        methods.append(GeneralKnowledge())
    return methods + _against_forgetting(config)


def check_data(config: FineTuningConfig, general: bool, base_val: bool) -> None:
    """Raise ConfigError where data are given that no setting draws on."""
    if general and not needs_general(config, Past(), base_val=False):
        raise ConfigError(
            "general_dataset has no effect: domain adaptation, regularization_method='ewc' and "
            "validation_on_base_tasks draw on it; set one of them, or leave it out"
        )
    if base_val and not config.validation_on_base_tasks:
        raise ConfigError("base_val_dataset has no effect without validation_on_base_tasks=True")


def _against_forgetting(config: FineTuningConfig) -> list[Any]:
    methods: list[Any] = []
    if config.regularization_method == "ewc" and config.regularization_strength:
        methods.append(EWC(config.regularization_strength, config.fisher == "empirical", config.fisher_decay))
    if config.regularization_method == "l2" and config.regularization_strength:
        methods.append(L2(config.regularization_strength))
    if config.memory_buffer_size is not None and config.replay_frequency is not None:
        methods.append(Replay(config.memory_buffer_size, config.replay_frequency))
    if config.validation_on_base_tasks:
        methods.append(BaseTask())
    return methods


def needs_general(config: FineTuningConfig, past: Past, base_val: bool) -> bool:
    """Whether some method draws on what the base model is for: a domain's batches, the Fisher information of a first
    task's past, the judgement of base tasks that have no data of their own."""
    return (
        (config.domain_weight is not None and config.domain_weight < 1)
        or (
            config.regularization_method == "ewc" and bool(config.regularization_strength) and "ewc" not in past.methods
        )
        or (config.validation_on_base_tasks and not base_val)
    )
