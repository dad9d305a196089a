"""What a LoRA adapter is made of: one validated object."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal, NoReturn

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from ..errors import ConfigError, UnknownNameError, nearest

# Variants known by name, so that a configuration that asks for one is refused and not half obeyed.
NOT_YET = (
    *("use_dora", "use_qalora", "use_bdlora", "lora_bias", "layer_replication"),
    *("target_parameters", "alora_invocation_tokens", "arrow_config", "kasa_config", "velora_config"),
    *("monteclora_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config", "megatron_config"),
)


class LoRAConfig(BaseModel):
    """Low-rank adapters of a model's linear layers: ``y = x Wᵀ + b + scaling · drop(x) Aᵀ Bᵀ`` (arXiv 2106.09685).

    Args:
        rank: rows of A and columns of B, for each adapted layer or slice of a fused one.
        alpha: ``scaling = alpha / rank``; ``2 · rank`` unless given.
        dropout: probability of zero in ``drop(x)``, in [0, 1); training mode only.
        target_modules: which layers get an adapter: ``"attention"`` (query, key, value, output), ``"mlp"``,
            ``"embeddings"``, ``"all"`` or ``"all-linear"`` (every linear layer but the head), a name of
            ``models.names`` such as ``"attention.query"``, the end of a module's own path such as ``"q_proj"``, or a
            list of these.
        bias: which biases train: ``"none"``, ``"all"`` of the model's, or ``"lora_only"``, those of adapted layers.
        modules_to_save: modules that train whole, as a copy that is saved with the adapter: all whose path ends with
            one of these (as in PEFT also inside a word, "norm" fits "input_layernorm"); no low-rank adapter in them.
        trainable_token_indices: rows of the embedding, and of the output layer, that train whole (new tokens); the
            others keep their bits. No low-rank adapter on either.
        use_rslora: ``scaling = alpha / sqrt(rank)`` (arXiv 2312.03732).

    Raises:
        ConfigError: a value that is malformed or out of range; for an unknown key UnknownNameError with the nearest.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    rank: int = Field(16, ge=1)
    alpha: float = Field(None, gt=0, validate_default=False)  # type: ignore[assignment]  # filled in below
    dropout: float = Field(0.0, ge=0, lt=1)
    target_modules: list[str] | str = "attention"
    bias: Literal["none", "all", "lora_only"] = "none"
    modules_to_save: list[str] = []
    trainable_token_indices: list[Annotated[int, Field(ge=0)]] = []
    use_rslora: bool = False

    def __init__(self, **settings: Any) -> None:
        for name in settings:
            if name in NOT_YET:
                raise UnknownNameError(f"LoRAConfig: {name} is not yet available in this version: leave it out")
            if name not in LoRAConfig.model_fields:
                raise UnknownNameError(f"LoRAConfig: unknown key '{name}'{nearest(name, LoRAConfig.model_fields)}")
        try:
            super().__init__(**{name: value for name, value in settings.items() if (name, value) != ("alpha", None)})
        except ValidationError as error:
            _refuse(error, settings)

    @field_validator("target_modules", "modules_to_save", mode="before")
    @classmethod
    def _names(cls, names: Any, info: Any) -> Any:
        if isinstance(names, tuple | set):
            names = sorted(names) if isinstance(names, set) else list(names)
        if names is None and info.field_name == "modules_to_save":
            return []
        if info.field_name == "target_modules" and not names:
            raise ValueError("should name at least one layer")
        return "all" if names == "all-linear" else names

    @model_validator(mode="after")
    def _default_alpha(self) -> "LoRAConfig":
        if self.alpha is None:
            self.__dict__["alpha"] = 2.0 * self.rank  # not "given": model_fields_set stays as it is
        return self

    @property
    def scaling(self) -> float:
        """What the product ``x Aᵀ Bᵀ`` is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.use_rslora else self.rank)


def _refuse(error: ValidationError, settings: Mapping[str, Any]) -> NoReturn:
    """One line of what was given and what it should be, for each wrong value."""
    wrong = {
        f"{problem['loc'][0]}={settings.get(str(problem['loc'][0]))!r} "
        + str(problem.get("ctx", {}).get("error") or problem["msg"]).replace("Input should", "should")
        for problem in error.errors()
    }
    raise ConfigError("LoRAConfig: " + "; ".join(sorted(wrong))) from None
