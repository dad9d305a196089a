"""The learning rate of each optimizer step, a function of the step alone."""

import math

from .config import FineTuningConfig


class Schedule:
    """Linear warm-up to the peak, then the course that ``config.scheduler`` names.

    With W warm-up steps of T in all, m = ``min_lr_ratio``, and u = (step - W) / (T - W) for steps counted from 0:

        step < W    peak * (step + 1) / W
        constant    peak
        linear      peak * (m + (1 - m) * (1 - u))
        cosine      peak * (m + (1 - m) * (1 + cos(pi * u)) / 2)

    The first step of the warm-up already moves the weights. W is ``warmup_steps``, or ``warmup_ratio`` of T rounded up.
    The peak is ``learning_rate``; with a ``learning_rate_schedule`` that of the step's epoch.

    Args:
        config: the settings.
        total_steps: T.
        steps_per_epoch: by which a step's epoch is known.
    """

    def __init__(self, config: FineTuningConfig, total_steps: int, steps_per_epoch: int) -> None:
        self.rates = [(0, config.learning_rate), *(config.learning_rate_schedule or [])]
        self.steps_per_epoch = steps_per_epoch
        self.course = config.scheduler
        self.floor = config.min_lr_ratio
        self.total = total_steps
        self.warmup = config.warmup_steps or math.ceil((config.warmup_ratio or 0.0) * total_steps)

    def __call__(self, step: int) -> float:
        """The rate of a step, the first one being 0."""
        epoch = step // self.steps_per_epoch
        peak = [rate for start, rate in self.rates if start <= epoch][-1]
        if step < self.warmup:
            return peak * (step + 1) / self.warmup
        if self.course == "constant":
            return peak
        u = (step - self.warmup) / (self.total - self.warmup)
        left = 1.0 - u if self.course == "linear" else (1.0 + math.cos(math.pi * u)) / 2.0
        return peak * (self.floor + (1.0 - self.floor) * left)
