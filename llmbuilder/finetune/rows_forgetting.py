"""Settings, one row each. Against forgetting: EWC, L2-SP, replay, the base task."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel

from .rows import row

STRENGTH = {"ewc": 1.0, "l2": 0.01}
BUFFER, FREQUENCY = 1000, 0.1


class ForgettingRows(BaseModel):
    """Against forgetting: EWC, L2-SP, replay, the base task."""

    continual_learning: bool = row(
        False,
        "one task of several: keep what earlier ones need, by `regularization_method` (ewc, unless only replay is "
        "asked for) and replay, and look back on this one at its end",
        "extra_loss in metrics.jsonl, past/",
        "methods/test_ewc.py",
    )
    regularization_method: Literal["ewc", "l2"] | None = row(
        None,
        "penalty on moving the weights: `ewc` by how much the past depends on each, `l2` all alike (adapters: the "
        "layer's effective weight); under `continual_learning` ewc, else l2, unless given",
        "extra_loss in metrics.jsonl, weights",
        "methods/test_l2.py",
    )
    regularization_strength: float | None = row(
        None,
        f"factor of the penalty ({STRENGTH['ewc']:g} for ewc, {STRENGTH['l2']:g} for l2, unless given; with ewc, 1 "
        "weighs a past token as a present one); 0: none",
        "drift of the weights",
        "methods/test_domain.py",
        ge=0,
    )
    fisher: Literal["true", "empirical"] = row(
        "true",
        "labels of ewc's Fisher information: drawn from the model (`true`), or the data's (`empirical`)",
        "fisher in past/",
        "methods/test_fisher.py",
    )
    fisher_decay: float | None = row(
        None,
        "online ewc: one anchor, the newest, and the past's Fisher information fades by this factor a task; none: "
        "every task counts in full",
        "fisher and anchors in past/",
        "methods/test_ewc.py",
        ge=0,
        le=1,
    )
    memory_buffer_size: int | None = row(
        None,
        f"examples of earlier tasks to keep, a uniform sample ({BUFFER} where replay_frequency is given)",
        "examples in past/",
        "methods/test_replay.py",
        ge=1,
    )
    replay_frequency: float | None = row(
        None,
        f"share of the examples that comes from earlier tasks' ({FREQUENCY} where memory_buffer_size is given)",
        "shares of the examples",
        "methods/test_replay.py",
        gt=0,
        lt=1,
    )
    preserve_base_capabilities: bool = row(
        False,
        "a penalty on moving the weights away from the base model's, by `regularization_method`",
        "drift of the weights",
        "test_guide.py",
    )
    validation_on_base_tasks: bool = row(
        False,
        "judge the model on base_val_dataset (else on general text) before and after",
        "forgetting in results.json",
        "methods/test_base_task.py",
    )

    @staticmethod
    def implied(settings: Mapping[str, Any]) -> dict[str, Any]:
        """The same settings with those that they imply, before validation."""
        given = dict(settings)
        replay, penalty = (
            ("memory_buffer_size", "replay_frequency"),
            ("regularization_method", "regularization_strength"),
        )
        asked = any(given.get(name) is not None for name in penalty)
        replays = any(given.get(name) is not None for name in replay)
        continual, preserve = given.get("continual_learning"), given.get("preserve_base_capabilities")
        if preserve or (continual and (asked or not replays)) or (asked and given.get("adaptation_method") == "domain"):
            method = given.get("regularization_method") or ("ewc" if continual else "l2")
            strength = given.get("regularization_strength")
            given["regularization_method"] = method
            given["regularization_strength"] = STRENGTH.get(method) if strength is None else strength
        if replays and continual:
            for name, usual in zip(replay, (BUFFER, FREQUENCY), strict=True):
                given[name] = usual if given.get(name) is None else given[name]
        return given

    def contradictions(self) -> dict[str, bool]:
        """What is wrong, said for people, and whether it is so."""
        config: Any = self
        penalty = [
            name for name in ("regularization_method", "regularization_strength") if getattr(self, name) is not None
        ]
        replay = [name for name in ("memory_buffer_size", "replay_frequency") if getattr(self, name) is not None]
        fisher = [
            name
            for name, given in {"fisher": self.fisher != "true", "fisher_decay": self.fisher_decay is not None}.items()
            if given
        ]
        switched = self.continual_learning or self.preserve_base_capabilities or config.adaptation_method == "domain"
        ewc = self.regularization_method == "ewc" and bool(self.regularization_strength)
        return {
            f"{' and '.join(penalty)} act only under continual_learning, preserve_base_capabilities or "
            "adaptation_method='domain': switch one of them on": bool(penalty) and not switched,
            f"{' and '.join(replay)} act only under continual_learning=True: an earlier task's examples are replayed": (
                bool(replay) and not self.continual_learning
            ),
            f"{' and '.join(fisher)} act only with regularization_method='ewc'": bool(fisher) and not ewc,
            "fisher_decay fades one task after another, and acts only under continual_learning=True": (
                self.fisher_decay is not None and not self.continual_learning
            ),
            "preserve_base_capabilities=True contradicts regularization_strength=0: drop one of them": (
                self.preserve_base_capabilities and self.regularization_strength == 0
            ),
            "shared_encoder=False: replayed examples belong to none of the tasks, and would train no adapter": (
                bool(replay) and not config.shared_encoder
            ),
            "ewc looks back on a task by one output layer and one adapter: drop it, or task_specific_heads and "
            "shared_encoder=False": ewc and (config.task_specific_heads or not config.shared_encoder),
        }
