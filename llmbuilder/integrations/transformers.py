"""Adapters under transformers' ``Trainer``: the model trains there as it is; this saves its adapter at checkpoints."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..nn import list_adapters, save_adapter


class SaveAdapter(TrainerCallback):
    """Writes the adapters in PEFT's format into each checkpoint that Trainer saves.

    ``Trainer(model, ..., callbacks=[SaveAdapter()])`` leaves a folder ``adapter`` in every ``checkpoint-N`` (one of
    each adapter's name in it where there are several). Trainer's own files beside it hold the whole model under the
    names that it has while it carries adapters, and are what ``resume_from_checkpoint`` reads.
    """

    def on_save(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: nn.Module,
        **others: Any,
    ) -> None:
        if not state.is_world_process_zero:
            return
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "adapter"
        names = list(list_adapters(model))
        for name in names:
            save_adapter(model, folder if len(names) == 1 else folder / name, name)
