"""LoRAConfig: defaults, and refusals that say what to write instead."""

import math

import pytest

from llmbuilder.errors import ConfigError, UnknownNameError
from llmbuilder.nn import LoRAConfig


def test_alpha_is_twice_the_rank_unless_given() -> None:
    assert LoRAConfig().rank == 16
    assert LoRAConfig().alpha == 32
    assert LoRAConfig(rank=3).alpha == 6
    assert LoRAConfig(rank=3, alpha=None).alpha == 6
    assert LoRAConfig(rank=4, alpha=1.5).alpha == 1.5


def test_a_default_alpha_does_not_count_as_given() -> None:
    assert LoRAConfig(rank=3).model_fields_set == {"rank"}


def test_scaling_is_alpha_over_rank_or_over_its_root() -> None:
    assert LoRAConfig(rank=4, alpha=10).scaling == 2.5
    assert LoRAConfig(rank=5, alpha=10, use_rslora=True).scaling == 10 / math.sqrt(5)


@pytest.mark.parametrize("spelling", ["all-linear", "all"])
def test_all_linear_is_another_spelling_of_all(spelling: str) -> None:
    assert LoRAConfig(target_modules=spelling) == LoRAConfig(target_modules="all")


def test_tuples_and_sets_of_names_become_lists() -> None:
    assert LoRAConfig(target_modules=("v", "q")).target_modules == ["v", "q"]
    assert LoRAConfig(target_modules={"v", "q"}).target_modules == ["q", "v"]


def test_an_unknown_key_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(UnknownNameError, match="unknown key 'rnk'; did you mean 'rank'"):
        LoRAConfig(rnk=8)


@pytest.mark.parametrize("key", ["use_dora", "use_qalora", "lora_bias", "layer_replication"])
def test_variants_are_refused_by_name(key: str) -> None:
    with pytest.raises(UnknownNameError, match=f"{key} is not yet available"):
        LoRAConfig(**{key: True})


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank": 0}, "rank=0 should be greater than or equal to 1"),
        ({"rank": 2.5}, "rank=2.5 should be a valid integer"),
        ({"alpha": 0}, "alpha=0 should be greater than 0"),
        ({"alpha": math.inf}, "alpha=inf should be a finite number"),
        ({"dropout": 1.0}, "dropout=1.0 should be less than 1"),
        ({"bias": "some"}, "bias='some' should be 'none', 'all' or 'lora_only'"),
        ({"target_modules": []}, r"target_modules=\[\] should name at least one layer"),
    ],
)
def test_a_wrong_value_is_refused_with_what_it_should_be(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        LoRAConfig(**settings)


def test_a_config_does_not_change() -> None:
    config = LoRAConfig()
    with pytest.raises(ValueError, match="frozen"):
        config.rank = 8  # type: ignore[misc]
