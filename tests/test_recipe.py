"""Settings, presets and keys. The refusals are tested through `prune` in test_pruning.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

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


def model_of(positions: int | None) -> Any:
    """As much of a model as a recipe looks at."""
    config = SimpleNamespace(max_position_embeddings=positions)
    if positions is None:
        del config.max_position_embeddings
    return SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))


@pytest.mark.parametrize(
    ("positions", "length", "batch_size"),
    [(131072, 2048, 2), (2048, 2048, 2), (1024, 1024, 4), (512, 512, 8), (None, 2048, 2)],
)
def test_blocks_are_as_long_as_the_model_allows(
    positions: int | None, length: int, batch_size: int
) -> None:
    recipe = make_recipe().for_model(model_of(positions))
    assert recipe.calibration.max_seq_length == length
    assert recipe.learn.batch_size == batch_size and recipe.num_samples == 400 * batch_size
    assert recipe.for_model(model_of(64)) == recipe
    wanda = make_recipe("wanda").for_model(model_of(positions))
    assert wanda.calibration.max_seq_length == length


@pytest.mark.parametrize("name", ["n_positions", "max_seq_len", "n_ctx"])
def test_a_model_may_call_its_positions_otherwise(name: str) -> None:
    config = SimpleNamespace(**{name: 512})
    model: Any = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: config))
    assert make_recipe().for_model(model).calibration.max_seq_length == 512


def test_given_lengths_are_kept() -> None:
    recipe = make_recipe(max_seq_length=100, batch_size=3).for_model(model_of(512))
    assert (recipe.calibration.max_seq_length, recipe.learn.batch_size) == (100, 3)
    assert make_recipe(max_seq_length=256).for_model(model_of(512)).learn.batch_size == 16
    paper = make_recipe(preset="llama-2-7b").for_model(model_of(4096))
    assert (paper.calibration.max_seq_length, paper.learn.batch_size) == (4096, 1)


@pytest.mark.parametrize(("processes", "batch_size"), [(1, 2), (2, 2), (4, 4), (3, 3)])
def test_default_batches_can_be_shared_out(processes: int, batch_size: int) -> None:
    recipe = make_recipe().for_model(model_of(2048), processes)
    assert recipe.learn.batch_size == batch_size


@pytest.mark.parametrize(
    ("tokens", "steps"),
    [("25M", 6104), ("1.6M", 391), (1638400, 400), ("4,097", 2), ("1", 1), (".5b", 122071)],
)
def test_tokens_set_the_steps(tokens: str | int, steps: int) -> None:
    recipe = make_recipe(tokens=tokens).for_model(model_of(8192))
    assert recipe.learn.steps == steps
    same = make_recipe(steps=steps).for_model(model_of(8192))
    assert recipe.key("model", "data") == same.key("model", "data")


@pytest.mark.parametrize("tokens", ["many", "0", "-5", "1.5T", "", "1e6", 0])
def test_no_number_of_tokens(tokens: str | int) -> None:
    with pytest.raises(ProxsparseError, match=r"--tokens is .*such as 1638400, 1\.6M or 25M"):
        make_recipe(tokens=tokens)


def test_tokens_and_steps_exclude_each_other_but_win_over_a_preset() -> None:
    with pytest.raises(ProxsparseError, match=r"--tokens 1M and --steps 5 both say how long"):
        make_recipe(tokens="1M", steps=5)
    recipe = make_recipe(preset="llama-2-7b", tokens="8192").for_model(model_of(4096))
    assert recipe.learn.steps == 2


def test_default_number_of_samples() -> None:
    assert make_recipe("wanda").num_samples == 128
    assert make_recipe("gates", num_calibration_samples=50).num_samples == 50


def test_key_follows_what_decides_the_result() -> None:
    def key(data: str = "data", **settings: Any) -> str:
        return make_recipe(**settings).for_model(model_of(512)).key("model", data)

    assert key(checkpoint_every=7) == key()
    assert key(seed=1) != key()
    assert key(steps=399) != key()
    assert key("other data") != key()


def test_as_dict_holds_only_what_took_part() -> None:
    assert "steps" not in make_recipe("wanda").as_dict()
    assert "calibration" not in make_recipe("magnitude").as_dict()
    recipe = make_recipe(ignore=["a"]).for_model(model_of(512))
    assert recipe.as_dict()["ignore"] == ["a"]


def test_unknown_setting_suggests() -> None:
    with pytest.raises(ProxsparseError, match="did you mean max_seq_length"):
        make_recipe(max_seq_len=5)


@pytest.mark.parametrize(
    ("settings", "lr", "lam", "units"),
    [
        ({}, 0.03, 0.03, "weights"),
        ({"lam": 2.0}, 1e-4, 2.0, "absolute"),
        ({"lr": 0.5}, 0.5, 0.03, "weights"),
        ({"lam": 2.0, "lam_units": "weights"}, 0.03, 2.0, "weights"),
    ],
)
def test_a_recipe_has_numbers_and_their_units(
    settings: dict[str, Any], lr: float, lam: float, units: str
) -> None:
    recipe = make_recipe("proxsparse", **settings).for_model(model_of(512))
    found = recipe.as_dict()
    assert (found["lr"], found["lam"], found["lam_units"]) == (lr, lam, units)
    assert recipe.method.distils(recipe.options) == (units == "weights")
    # Given back, it is the same recipe.
    again = {key: value for key, value in found.items() if key != "method"}
    assert make_recipe("proxsparse", **again).for_model(model_of(512)).as_dict() == found


def test_gates_have_numbers_too() -> None:
    found = make_recipe(lam=0.0).for_model(model_of(512)).as_dict()
    assert (found["lr"], found["lam"]) == (0.06, 0.0)


def test_absolute_units_need_a_lam() -> None:
    with pytest.raises(ProxsparseError, match="--lam-units absolute has no lam of its own"):
        make_recipe("proxsparse", lam_units="absolute").for_model(model_of(512))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"steps": "200"}, r"--steps is '200' \(str\): it must be a whole number"),
        ({"steps": True}, r"--steps is True \(bool\): it must be a whole number"),
        ({"steps": 2.5}, r"--steps is 2.5 \(float\)"),
        ({"lr": "high"}, r"--lr is 'high' \(str\): it must be a number"),
        ({"random_init": 1}, r"--random-init is 1 \(int\): it must be True or False"),
        ({"split": 3}, r"--split is 3 \(int\): it must be a string"),
        ({"ignore": "down_proj"}, r"--ignore is 'down_proj' \(str\): it must be a list of strings"),
        ({"ignore": (1,)}, r"--ignore is \(1,\) \(tuple\): it must be a list of strings"),
    ],
)
def test_wrong_types_are_named(setting: dict[str, Any], message: str) -> None:
    with pytest.raises(ProxsparseError, match=message):
        make_recipe(**setting)
