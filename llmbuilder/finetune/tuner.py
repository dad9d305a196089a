"""The one training loop. What differs between methods is in ``llmbuilder.methods``, hooks that this loop calls."""

import dataclasses
import itertools
import math
import os
import time
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError, LLMBuilderError
from ..methods import Batch, Key, Methods, Run
from ..models import weights_digest
from ..nn import list_adapters
from ..nn.tasks import find_heads, save_heads
from . import sampler
from .assemble import check_data, make_methods
from .checkpoint import Checkpoint, join_states, load_checkpoint, newest_checkpoint, save_checkpoint, split_states
from .config import FineTuningConfig
from .display import Display
from .files import explained
from .folder import open_folder
from .interrupt import interruptible
from .judge import Judge
from .loader import WHAT, Loader
from .metrics import MetricsLog, draw_loss
from .optimizer import (
    clip_gradients,
    copy_weights,
    load_optimizer_tensors,
    make_optimizer,
    optimizer_tensors,
    set_rate,
    trained_parameters,
)
from .past import Past, go_on
from .placement import enable_checkpointing, place, use_bf16
from .progress import Progress
from .randomness import random_state, seed_all, set_random_state, undisturbed
from .results import EvalResults, Results, perplexity
from .schedule import Schedule


def finetune_model(model: nn.Module, dataset: Any, config: FineTuningConfig | None = None) -> Results:
    """``FineTuner(model, dataset, config=config).train()``."""
    return FineTuner(model, dataset, config=config).train()


class FineTuner:
    """Fine-tunes a model; changes it in place.

    Args:
        model: see ``docs/design.md``; adapters are added to it, or all of it trains.
        train_dataset: examples to learn from: a dataset of ``llmbuilder.data``, or any sequence of examples.
        val_dataset: examples to judge by. Without it ``validation_split`` of the training data is held out; without
            that too, both perplexities are those of the training data, and a warning says so.
        config: the settings; all defaults when None.
        resume: go on from the newest whole checkpoint in ``config.output_dir``, from the start where there is none.
            Weights, losses and files come out as if the run had never stopped, bit for bit on the same machine with the
            same number of threads.
        overwrite: replace a run that is in ``config.output_dir``.
        general_dataset: what the model is for so far, for methods that keep it; without it they sample text from the
            model itself.
        base_val_dataset: the tasks that the model can do already, to be judged before and after.
        continue_from: an earlier run whose model this one trains on, in a next task: its folder (the weights or the
            adapter there are loaded into ``model``), or its FineTuner, whose model ``model`` is then. Fisher
            information, anchors and replay buffer come along. A resumed run needs it again.

    Raises:
        ConfigError: settings that contradict each other, or the model.
        LLMBuilderError: no examples, examples longer than the model's context, or a folder that holds a run already.
    """

    def __init__(
        self,
        model: nn.Module,
        train_dataset: Any,
        val_dataset: Any = None,
        config: FineTuningConfig | None = None,
        *,
        resume: bool = False,
        overwrite: bool = False,
        general_dataset: Any = None,
        base_val_dataset: Any = None,
        continue_from: "FineTuner | str | os.PathLike[str] | None" = None,
    ) -> None:
        self.model = model
        self.config = config or FineTuningConfig()
        self.folder = open_folder(self.config.output_dir, resume, overwrite, continue_from)
        self._resume = resume
        self._trained = False
        self._task_ended = False
        # Before anything is added to the model: what adapters were trained on.
        untouched = self.config.use_lora and not list_adapters(model) and (self.folder or continue_from is not None)
        base = weights_digest(model.state_dict().items()) if untouched else ""
        self._past = self._recall(continue_from, base)
        self.methods = Methods(make_methods(self.config, self._past, base_val_dataset is not None))
        self.methods.extend(model)
        self.loader = Loader(model, self.config)
        train, self.val_dataset, self.evaluated_on, self._hashes = self.loader.divide(train_dataset, val_dataset)

        check_data(self.config, general_dataset is not None, base_val_dataset is not None)
        for name, given in (("general", general_dataset), ("base_val", base_val_dataset)):
            if given is not None:
                self._hashes[name] = self.loader.bind(given, name)

        self.device = place(model, self.config)
        self.run = Run(
            model,
            self.config.seed,
            {"train": train},
            general=general_dataset,
            base_val=base_val_dataset,
            continues=continue_from is not None,
            batch_size=self.config.batch_size,
            autocast=self._autocast,
            loss=lambda dataset: self.judge.score(dataset).loss,
        )
        with undisturbed():
            seed_all(self.config.seed)
            self.methods.load_past(self._past.methods)
            self.methods.prepare(self.run)
        for name, source in self.run.sources.items():
            if name != "train" and source is not general_dataset:  # what methods added; the rest is checked
                self.loader.bind(source, name)
        self.bf16 = use_bf16(model, self.config)
        self.trained = trained_parameters(model)
        if not self.trained:
            raise ConfigError("nothing is left to train: freeze less, or name other target_modules")
        if self.config.gradient_checkpointing:
            enable_checkpointing(model)

        self.judge = Judge(model, self.loader, self.bf16, self.methods.parts)
        self.head = self.judge.head
        frozen = [(name, weight) for name, weight in model.named_parameters() if name not in self.trained]
        self._base = self._past.base or (weights_digest(frozen) if self.folder and not self.config.use_lora else "")
        self.optimizer = make_optimizer(self.config, self.trained)
        window = self.config.gradient_accumulation_steps
        steps_per_epoch = math.ceil(len(self._plan(0)) / window)
        self.total_steps = self.config.max_steps or self.config.num_epochs * steps_per_epoch
        self.schedule = Schedule(self.config, self.total_steps, steps_per_epoch)
        self.progress = Progress()
        self._epoch = 0.0
        self._best: dict[str, Tensor] = {}

    # The loop

    def train(self) -> Results:
        """Train from here to the end, and write what came of it into the run's folder.

        Raises:
            LLMBuilderError: the loss or the gradient is no longer finite, a checkpoint does not fit the run, or the
                disk is full. What is on the disk is the last whole checkpoint.
            KeyboardInterrupt: as pressed; a warning says how to go on.
        """
        if self._trained:
            raise LLMBuilderError("this FineTuner has trained already; make a new one to train on")
        if self._task_ended:
            raise LLMBuilderError(
                "end_task has made a past task of this FineTuner's data: train with a new one, continue_from= this one"
            )
        self._trained = True
        with undisturbed():
            seed_all(self.config.seed)
            self._start()
            log = MetricsLog(self.folder.path if self.folder else None, self.progress.step)
            try:
                with interruptible() as check:
                    with Display(self.total_steps, self.progress.step) as display:
                        for window in self._windows():
                            row = self._step(window)
                            if self._evaluation_is_due():
                                row |= self._evaluate_step()
                            log.add(row)
                            display.step(row)
                            if self._save_is_due():
                                log.sync()
                                self._save()
                            check()
                    results = self._finish(log.rows)
                return results
            except KeyboardInterrupt:
                warnings.warn(f"interrupted after step {self.progress.step}{self._last_checkpoint()}", stacklevel=2)
                raise
            finally:
                log.close()
                self.model.eval()

    def _windows(self) -> Iterator[list[Batch]]:
        """The batches of each optimizer step that is left, epoch after epoch."""
        progress = self.progress
        while not self._is_over():
            plan = self._plan(progress.epoch)
            self.methods.start_epoch(progress.epoch)
            batches = self.loader.batches(self.run.sources, plan[progress.batches :])
            while window := list(itertools.islice(batches, self.config.gradient_accumulation_steps)):
                progress.batches += len(window)
                self._epoch = progress.epoch + progress.batches / len(plan)
                yield window
                if self._is_over():
                    return
            progress.epoch, progress.batches = progress.epoch + 1, 0

    def _step(self, window: list[Batch]) -> dict[str, Any]:
        """One optimizer step; returns its row of metrics.jsonl.

        The loss is the mean over the targets of the whole window, so that cutting a batch into smaller ones changes
        nothing but rounding.
        """
        started = time.perf_counter()
        progress, rate = self.progress, self.schedule(self.progress.step)
        self.model.train()
        set_rate(self.optimizer, rate)
        targets = sum(batch.targets for batch in window)
        loss = extra = 0.0
        for batch in window:
            batch.tensors = self.loader.to_device(batch.tensors)
            for part in self.methods.split(batch):
                with self._autocast():
                    main = self.methods.loss(self.model, part, window)
                    if main is None:
                        main = self.head.loss_sum(part.tensors)[0] / max(targets, 1)
                    more = self.methods.extra_loss(self.model, part, window)
                torch.autograd.backward(main if more is None else main + more)
                loss += float(main.detach())
                extra += 0.0 if more is None else float(more.detach())
        extra += self.methods.penalty()
        grad_norm = clip_gradients([*self.trained.values()], self.config.max_grad_norm)
        self._require_finite(progress.step + 1, loss + extra, grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        progress.step += 1
        self.methods.after_step(progress.step)
        seconds = time.perf_counter() - started
        progress.seconds += seconds
        row = {"step": progress.step, "epoch": self._epoch, "loss": loss, "lr": rate, "grad_norm": grad_norm}
        return (
            row
            | {"tokens": targets, "tokens_per_s": targets / seconds}
            | ({"extra_loss": extra} if self.methods.add_losses() else {})
        )

    def _require_finite(self, step: int, *values: float) -> None:
        if not all(math.isfinite(value) for value in values):
            raise LLMBuilderError(
                f"step {step}: loss or gradient is no longer finite ({', '.join(map(str, values))}); nothing of it "
                f"was written{self._last_checkpoint()}. Try a lower learning_rate, more warm-up, max_grad_norm=1, or "
                "dtype='fp32'"
            )

    # Evaluation

    def evaluate(self, dataset: Any) -> EvalResults:
        """Judge the model as it is now: see ``Judge.evaluate``."""
        return self.judge.evaluate(dataset)

    def _evaluation_is_due(self) -> bool:
        """Every ``eval_every`` steps where there is validation data or early stopping needs it; always at the end."""
        config, step = self.config, self.progress.step
        wanted = self.evaluated_on != "training" or config.early_stopping_patience is not None
        return step >= self.total_steps or bool(wanted and config.eval_every and step % config.eval_every == 0)

    def _evaluate_step(self) -> dict[str, float]:
        """Judge the model in the middle of training, and remember the best weights where early stopping wants them."""
        started, progress = time.perf_counter(), self.progress
        total = self.judge.score(self.val_dataset)
        self._require_finite(progress.step, total.loss)
        progress.last_loss = total.loss
        progress.worse += 1
        if total.loss < progress.best_loss:
            progress.best_loss, progress.best_step, progress.worse = total.loss, progress.step, 0
            if self.config.early_stopping_patience is not None:
                self._best = {name: weight.detach().to("cpu", copy=True) for name, weight in self.trained.items()}
        progress.seconds += time.perf_counter() - started
        values = {"loss": total.loss, "perplexity": perplexity(total.loss), "accuracy": total.accuracy}
        return {f"eval_{name}": value for name, value in values.items()}

    # Start and end

    def _start(self) -> None:
        """Go on from a checkpoint, or from the base model, which is judged first."""
        if self.folder and self._resume:
            self.folder.tidy()
            path = newest_checkpoint(self.folder.checkpoints)
            if path is not None:
                self._restore(path)
                return
            if self.folder.exported():
                raise LLMBuilderError(
                    f"{self.folder.path} holds a run that is over, and no whole checkpoint to go on from: "
                    "overwrite replaces it"
                )
        self.progress.base_loss = self.judge.score(self.val_dataset).loss
        with undisturbed():
            self.methods.before_task(self.run)
        if self.folder:
            self.folder.begin(self.config.to_yaml())

    def _is_over(self) -> bool:
        patience = self.config.early_stopping_patience
        return self.progress.step >= self.total_steps or (patience is not None and self.progress.worse >= patience)

    def _finish(self, rows: list[dict[str, Any]]) -> Results:
        """Put the best weights in place, let the methods look back, and write what the run leaves behind."""
        progress, early = self.progress, self.config.early_stopping_patience is not None
        if early:
            copy_weights(self._best, self.trained)
        saved = self.folder.results(rows) if self.folder and self._resume else None
        if self.folder is not None and saved is not None:
            self._past = Past.load(self.folder.past)
            self.methods.load_past(self._past.methods)
            self._task_ended = True
            return saved
        self.end_task()
        base = perplexity(progress.base_loss)
        final = perplexity(progress.best_loss if early else progress.last_loss)
        results = Results(
            base_perplexity=base,
            final_perplexity=final,
            improvement_percentage=100.0 * (base - final) / base,
            training_time=timedelta(seconds=progress.seconds),
            evaluated_on=self.evaluated_on,
            steps=progress.step,
            best_step=progress.best_step if early else progress.step,
            history=rows,
            **self.methods.results(),
        )
        if self.folder:
            with explained(self.folder.path):
                self.methods.export(self.model, self.folder.path)
                if find_heads(self.model) is not None:  # of this run's tasks or of earlier ones
                    save_heads(self.model, self.folder.path / "heads")
            draw_loss(self.folder.path / "loss.png", rows)
            self.folder.save_results(results.to_dict())
        return results

    # From task to task

    def end_task(self, name: str = "") -> None:
        """Let the methods look back on the task of the training data, with the model as it is, and count it as past.

        ``train()`` does so at its end; then this gives the task its name and nothing else. Before ``train()`` it makes
        a task of data that the model knows already: a FineTuner with ``continue_from=`` this one goes on from there.
        """
        if not self._task_ended:
            if self._resume and not self._trained:
                raise LLMBuilderError(
                    "end_task before train() would make a past of the model as it is, not of the run "
                    "that is resumed: train() first"
                )
            self.model.eval()
            with undisturbed():
                self.methods.after_task(self.run)
            # What this run's methods do not know stays as it was, for a run that asks for it again.
            known = {name: past for name, past in self.methods.past().items() if past}
            tasks = [*self._past.tasks, {"name": "", "data": self._hashes["train"]}]
            self._past = Past(tasks, self._past.methods | known, self._past.base)
            self._task_ended = True
        self._past.tasks[-1]["name"] = name or self._past.tasks[-1]["name"] or f"task {len(self._past.tasks)}"
        if self.folder and self._trained:
            self._past.save(self.folder.past)

    def _recall(self, source: "FineTuner | str | os.PathLike[str] | None", base: str) -> Past:
        """Put the model, of the hash ``base``, where an earlier run left it, and return what that run knew."""
        if source is None:
            return Past(base=base)
        if not isinstance(source, FineTuner):
            return go_on(self.model, Path(source), self.config.use_lora, base)
        if source.model is not self.model or not source._task_ended:
            raise ConfigError("continue_from: give a FineTuner that has trained, and the model that it trained")
        return source._past

    # Checkpoints

    def _save_is_due(self) -> bool:
        every = self.config.save_every
        return self.folder is not None and (self._is_over() or bool(every and self.progress.step % every == 0))

    def _save(self) -> None:
        assert self.folder is not None
        random_tensors, random_values = random_state()
        method_tensors, method_values = split_states(self.methods.state())
        tensors = {
            "trained": {name: weight.detach() for name, weight in self.trained.items()},
            "optimizer": optimizer_tensors(self.optimizer, self.trained),
            "random": random_tensors,
            "methods": method_tensors,
            "best": self._best,
        }
        values = {
            "progress": dataclasses.asdict(self.progress),
            "config": self.config.resolved(),
            "data": self._hashes,
            "base": self._base,
            "tasks": self._past.tasks,
            "random": random_values,
            "methods": method_values,
        }
        save_checkpoint(self.folder.checkpoints, self.progress.step, Checkpoint(tensors, values))

    def _restore(self, path: Path) -> None:
        """Take back what ``_save`` wrote; into storage of this process, for bits depend on alignment."""
        checkpoint = load_checkpoint(path)
        tensors, values = checkpoint.tensors, checkpoint.values
        changes = FineTuningConfig(**values["config"]).changes(self.config)
        if changes:
            raise ConfigError(f"{path} was made with other settings ({'; '.join(changes)}): resume with those it had")
        names = [name for name in WHAT if values["data"].get(name) != self._hashes.get(name)]
        if names:
            raise ConfigError(f"{path} was made with other {WHAT[names[0]]}: resume with the data it had")
        if values["tasks"] != self._past.tasks:
            raise ConfigError(f"{path} was made after other tasks: resume with the continue_from it had")
        shapes = {name: weight.shape for name, weight in self.trained.items()}
        others = {name: weight.shape for name, weight in tensors["trained"].items()}
        if others != shapes or values["base"] != self._base:
            raise ConfigError(f"{path} was made with another model: resume with the model it had")
        copy_weights(tensors["trained"], self.trained)
        load_optimizer_tensors(self.optimizer, self.trained, tensors["optimizer"])
        self.methods.load_state(join_states(tensors["methods"], values["methods"]))
        self._best = {name: value.clone() for name, value in tensors["best"].items()}
        self.progress = Progress(**values["progress"])
        set_random_state((tensors["random"], values["random"]))

    # Small things

    def _plan(self, epoch: int) -> list[list[Key]]:
        config, size = self.config, len(self.run.sources["train"])
        return self.methods.batches(epoch, sampler.shuffled(size, config.batch_size, config.seed, epoch))

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16)

    def _last_checkpoint(self) -> str:
        path = newest_checkpoint(self.folder.checkpoints) if self.folder else None
        return f"; the last checkpoint is {path}, and resume goes on from there" if path else ""
