"""The settings of every run, one row each; those of the methods are in ``rows_forgetting.py`` and ``rows_methods.py``.

A class here declares rows and nothing else: ``FineTuningConfig`` (config.py) joins them and says what they mean
together. pydantic lists the fields of the last base first.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

Targets = list[str] | str


def row(
    default: Any,
    effect: str,
    observable: str,
    test: str,
    *,
    flag: str = "",
    changes_weights: bool = True,
    **limits: Any,
) -> Any:
    """One setting: its default, what it does, by what it is seen, the file of tests that sees it, a short flag, limits.

    ``changes_weights=False`` marks what a resumed run may change.
    """
    extra: dict[str, Any] = {"observable": observable, "test": test, "flag": flag, "changes_weights": changes_weights}
    return Field(default, description=effect, json_schema_extra=extra, **limits)


class RunRows(BaseModel):
    """What every run has."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    # Training
    num_epochs: int = row(
        5, "passes over the training data", "epochs in metrics.jsonl", "finetune/test_tuner.py", flag="epochs", ge=1
    )
    max_steps: int | None = row(
        None,
        "stop after this many optimizer steps, whatever `num_epochs` says",
        "steps",
        "finetune/test_tuner.py",
        ge=1,
    )
    learning_rate: float = row(
        5e-5, "peak learning rate", "lr in metrics.jsonl", "finetune/test_schedule.py", flag="lr", gt=0
    )
    batch_size: int = row(8, "examples in one forward pass", "batch shapes", "finetune/test_tuner.py", ge=1)
    gradient_accumulation_steps: int = row(
        1,
        "batches in one optimizer step; the loss is the mean over all their targets",
        "gradients equal one big batch",
        "finetune/test_tuner.py",
        ge=1,
    )
    seed: int = row(
        0,
        "seeds every random choice: order, dropout, adapter start, split",
        "bits of the weights",
        "finetune/test_tuner.py",
        ge=0,
        lt=2**63,
    )

    # What trains
    use_lora: bool = row(
        None,
        "train low-rank adapters instead of the weights; true when any LoRA setting is given",
        "trainable names",
        "finetune/test_tuner.py",
    )
    freeze_embeddings: bool = row(
        False, "the embeddings (and a head tied to them) do not train", "bits of the weights", "finetune/test_tuner.py"
    )
    freeze_layers: int = row(
        0,
        "the lowest n blocks do not train (their adapters stay zero)",
        "bits of the weights",
        "finetune/test_tuner.py",
        ge=0,
    )
    lora_rank: int | None = row(
        None, "rank of the adapters (16 unless given)", "shapes of A and B", "finetune/test_tuner.py", ge=1
    )
    lora_alpha: float | None = row(
        None, "adapters are scaled by alpha / rank (2 * rank unless given)", "scale", "nn/test_against_peft.py", gt=0
    )
    lora_dropout: float | None = row(
        None,
        "dropout on the adapters' input (`dropout_rate` unless given)",
        "outputs in training",
        "finetune/test_tuner.py",
        ge=0,
        lt=1,
    )
    lora_target_modules: Targets | None = row(
        None,
        "layers that get adapters: names, `attention`, `mlp`, `embeddings`, or `all` (every linear layer but the head)",
        "trainable names",
        "finetune/test_config.py",
    )
    target_modules: Targets | None = row(
        None, "another name of `lora_target_modules`", "trainable names", "nn/test_inject.py"
    )
    lora_config: Any = row(
        None,
        "a LoRAConfig, or a mapping of its fields (bias, modules_to_save, use_rslora …); its rank, alpha, dropout and "
        "target_modules are the settings above",
        "trainable names",
        "finetune/test_tuner.py",
    )

    # Regularization
    weight_decay: float = row(
        0.01,
        "weight decay (adamw: decoupled), not on norms and biases",
        "parameter groups",
        "finetune/test_optimizer.py",
        ge=0,
    )
    dropout_rate: float | None = row(
        None,
        "with LoRA the adapters' dropout, unless that is given; else p of every dropout that the model has",
        "outputs in training",
        "finetune/test_tuner.py",
        ge=0,
        lt=1,
    )

    # Optimization
    optimizer: Literal["adamw", "sgd"] = row(
        "adamw", "the optimizer", "weights after a step equal torch's", "finetune/test_optimizer.py"
    )
    scheduler: Literal["cosine", "linear", "constant"] = row(
        "cosine", "course of the learning rate after warm-up", "lr in metrics.jsonl", "finetune/test_schedule.py"
    )
    warmup_steps: int | None = row(
        None, "optimizer steps of linear warm-up", "lr in metrics.jsonl", "finetune/test_schedule.py", ge=0
    )
    warmup_ratio: float | None = row(
        None, "warm-up as a fraction of all steps", "lr in metrics.jsonl", "finetune/test_schedule.py", ge=0, le=1
    )
    min_lr_ratio: float = row(
        0.0,
        "the learning rate ends at this fraction of its peak",
        "lr in metrics.jsonl",
        "finetune/test_schedule.py",
        ge=0,
        le=1,
    )
    max_grad_norm: float | None = row(
        1.0,
        "clip the gradient's norm to this; none: never",
        "grad_norm and the weights",
        "finetune/test_tuner.py",
        gt=0,
    )

    # Evaluation and saving
    eval_every: int | None = row(
        100,
        "evaluate every so many optimizer steps, where there is validation data",
        "steps in metrics.jsonl",
        "finetune/test_tuner.py",
        ge=1,
    )
    save_every: int | None = row(
        500,
        "write a checkpoint every so many optimizer steps, where there is an `output_dir`",
        "checkpoints/step-N",
        "finetune/test_tuner.py",
        changes_weights=False,
        ge=1,
    )
    early_stopping_patience: int | None = row(
        None,
        "stop after this many evaluations without improvement; the best weights are restored",
        "last step, weights",
        "finetune/test_tuner.py",
        ge=1,
    )
    validation_split: float = row(
        0.0,
        "share of the training data that is held out where no validation data is given",
        "sizes",
        "finetune/test_tuner.py",
        ge=0,
        lt=1,
    )

    # Data
    task_type: (
        Literal["language_modeling", "question_answering", "instruction", "conversation", "summarization", "code"]
        | None
    ) = row(
        None,
        "prompt template, loss mask and metric; unless given, by the shape of the data",
        "prompts, metrics",
        "data/test_task.py",
    )
    max_seq_length: int = row(
        1024,
        "longest example in tokens; what is longer is cut, counted and reported",
        "report",
        "data/test_task.py",
        ge=2,
    )
    data_collator: Literal["default", "packing"] = row(
        "default",
        "`default` pads; `packing` puts several examples in one row, attention kept apart",
        "loss equal, rows fewer",
        "finetune/test_tuner.py",
    )
    dialogue_format: bool = row(
        False, "the data are conversations: messages, or text split by `turn_separator`", "mask", "data/test_load.py"
    )
    turn_separator: str | None = row(
        None, "separates the turns of plain-text conversations, user first", "turns", "data/test_task.py", min_length=1
    )
    response_loss_only: bool = row(
        True, "loss on the answers only (end-of-turn token included)", "mask", "data/test_task.py"
    )
    max_turns: int | None = row(
        None,
        "keep the system message and the last n turns; drops are counted",
        "turns, report",
        "data/test_task.py",
        ge=1,
    )

    # Machine
    dtype: Literal["auto", "fp32", "bf16"] = row(
        "auto",
        "bf16: frozen weights bf16, trained weights and optimizer state fp32, autocast; auto: as the model is",
        "dtypes",
        "finetune/test_placement.py",
    )
    device: str = row(
        "auto",
        "`cpu`, `cuda`, `cuda:1` …; auto: a GPU where torch sees one",
        "device of the weights",
        "finetune/test_placement.py",
        min_length=1,
    )
    gradient_checkpointing: bool = row(
        False,
        "recompute activations in the backward pass: less memory, same gradients",
        "gradients equal, memory",
        "finetune/test_tuner.py",
    )
    dataloader_pin_memory: bool = row(
        False, "batches in page-locked memory (GPU only)", "is_pinned", "finetune/test_resume.py", changes_weights=False
    )
    dataloader_num_workers: int = row(
        0,
        "processes that prepare batches; 0: the training process",
        "workers",
        "finetune/test_tuner.py",
        changes_weights=False,
        ge=0,
    )
    output_dir: Path | None = row(
        None,
        "the run's folder: adapter or model, checkpoints, metrics; none: nothing is written",
        "files",
        "finetune/test_tuner.py",
        flag="output",
        changes_weights=False,
    )
