"""Settings, presets and keys. The refusals are tested through `prune` in test_pruning.py."""

from __future__ import annotations

import pytest

from proxsparse.errors import ProxsparseError
from proxsparse.jobs.recipe import PRESETS, make_recipe


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_resolve(preset: str) -> None:
    recipe = make_recipe(preset=preset)
    assert recipe.method.name == "proxsparse"
    assert recipe.learn.lam == PRESETS[preset]["lam"] and recipe.learn.lr == PRESETS[preset]["lr"]
    assert recipe.num_samples == 400


def test_explicit_settings_win_over_a_preset() -> None:
    recipe = make_recipe(preset="llama-2-7b", lam=1.5, steps=10, seed=7)
    assert recipe.learn.lam == 1.5 and recipe.num_samples == 10
    assert recipe.learn.seed == recipe.calibration.seed == 7


def test_default_number_of_samples() -> None:
    assert make_recipe().num_samples == 3200
    assert make_recipe("wanda").num_samples == 128
    assert make_recipe("gates", num_calibration_samples=50).num_samples == 50


def test_key_follows_what_decides_the_result() -> None:
    key = make_recipe().key("model", "data")
    assert make_recipe(checkpoint_every=7).key("model", "data") == key
    assert make_recipe(seed=1).key("model", "data") != key
    assert make_recipe(steps=399).key("model", "data") != key
    assert make_recipe().key("model", "other data") != key


def test_as_dict_holds_only_what_took_part() -> None:
    assert "steps" not in make_recipe("wanda").as_dict()
    assert "calibration" not in make_recipe("magnitude").as_dict()
    assert make_recipe(ignore=["a"]).as_dict()["ignore"] == ["a"]


def test_unknown_setting_suggests() -> None:
    with pytest.raises(ProxsparseError, match="did you mean max_seq_length"):
        make_recipe(max_seq_len=5)
