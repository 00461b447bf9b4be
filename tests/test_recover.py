"""Recovery: the mask is held, the loss falls, and the chain from prune to pack holds."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import proxsparse
from proxsparse import Masks, ProxsparseError
from proxsparse.config import LearnConfig, NoOptions
from proxsparse.jobs.inspect import inspect_model
from proxsparse.jobs.pack import pack, unpack
from proxsparse.jobs.prune import apply
from proxsparse.learning import loop as learning
from proxsparse.learning.checkpoint import Checkpoints
from proxsparse.learning.job import Job
from proxsparse.methods import METHODS, RECOVERY
from proxsparse.methods import recover as rule_module
from proxsparse.methods.recover import recover
from proxsparse.models.loading import load_model
from proxsparse.models.targets import find_targets
from proxsparse.ops import mask_2to4, reference

DEMO = Path(proxsparse.__file__).parent / "demo_model"
FAST: dict[str, Any] = {"steps": 4, "batch_size": 2, "max_seq_length": 32, "checkpoint_every": 2}


def make_job(model: Any, directory: Path | None = None, **changes: Any) -> Job:
    tokens = torch.randint(0, 96, (6, 16), generator=torch.Generator().manual_seed(3))
    defaults: dict[str, Any] = {"steps": 6, "batch_size": 2, "checkpoint_every": 2}
    return Job(
        model=model,
        targets=find_targets(model),
        tokens=tokens,
        learn=LearnConfig(**{**defaults, **changes}),
        options=NoOptions(),
        checkpoints=None if directory is None else Checkpoints(directory / "checkpoints", "recipe"),
        metrics=None if directory is None else directory / "metrics.jsonl",
    )


def start(job: Job) -> tuple[Masks, dict[str, torch.Tensor]]:
    """The model pruned by magnitude."""
    masks, weights = METHODS["magnitude"].run(job), {}
    for t in job.targets.layers:
        weights[t.name] = torch.where(masks[t.parameter_name], t.weight(), 0.0)
    return masks, weights


@pytest.mark.parametrize("memory", RECOVERY.memory)
def test_masks_are_held_and_the_model_is_left_dense(
    tiny_model: Any, tiny_model_name: str, memory: str
) -> None:
    model = tiny_model(tiny_model_name)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    job = make_job(model, memory=memory, lr=0.1)
    masks, weights = start(job)
    learned = recover(job, masks, weights)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    for t in job.targets.layers:
        w, kept = learned[t.name], masks[t.parameter_name]
        assert w.dtype == t.weight().dtype and w.shape == t.shape
        assert (w[~kept] == 0).all() and not w[~kept].signbit().any()
        assert not torch.equal(w[kept], weights[t.name][kept])
    assert job.history[-1]["share_2to4"] == 1.0 and job.history[-1]["share_flipped"] == 0.0


def test_modes_of_memory_agree(tiny_model: Any) -> None:
    model = tiny_model("llama")
    masks, weights = start(make_job(model))
    fast, lean = (recover(make_job(model, memory=m), masks, weights) for m in ("fast", "balanced"))
    for name in fast:
        change = (fast[name] - weights[name]).norm()
        assert (fast[name] - lean[name]).norm() < 0.05 * change  # m and v are bfloat16


def test_a_step_is_adamw_at_a_rate_in_units_of_the_kept_weights(tiny_model: Any) -> None:
    model = tiny_model("llama")
    job = make_job(model)
    target = job.targets.layers[0]
    masks, weights = start(job)
    weights[target.name] = weights[target.name] * 8
    rule = rule_module._Recovery(job.learn, masks, weights)
    state = rule.start(target, target.weight())
    kept = weights[target.name][masks[target.parameter_name]]
    assert state["unit"].item() == pytest.approx(kept.square().mean().sqrt().item(), rel=1e-6)
    grad = torch.randn(target.shape, generator=torch.Generator().manual_seed(0))
    one = torch.ones((), dtype=torch.float64)
    scalars = rule_module.StepScalars(one, 0.02 * one, 0 * one, one)
    out = torch.empty(target.shape)
    rule.update_(target.weight(), state, grad, scalars, out)
    parameter = torch.nn.Parameter(weights[target.name].clone())
    parameter.grad = torch.where(masks[target.parameter_name], grad, 0.0)
    optimizer = torch.optim.AdamW(
        [parameter], lr=0.02 * state["unit"].item(), betas=rule.betas, weight_decay=0.0
    )
    optimizer.step()
    torch.testing.assert_close(out, parameter.detach(), rtol=1e-5, atol=1e-7)


def test_a_kept_weight_that_is_zero_stays_kept(tiny_model: Any) -> None:
    model = tiny_model("llama")
    job = make_job(model, lr=0.1)
    masks, weights = start(job)
    name = job.targets.layers[0].name
    weights[name] = torch.zeros_like(weights[name])
    learned = recover(job, masks, weights)
    assert learned[name].any()  # of a layer of zeros the unit is tiny, but the gradient moves it
    found = learned[name] != 0
    assert not (found & ~masks[job.targets.layers[0].parameter_name]).any()


@pytest.mark.parametrize("memory", RECOVERY.memory)
@pytest.mark.parametrize("killed_after", [2, 5])
def test_resumed_run_equals_undisturbed_one(
    tiny_model: Any, tmp_path: Path, memory: str, killed_after: int, monkeypatch: Any
) -> None:
    model = tiny_model("llama")
    masks, weights = start(make_job(model))
    undisturbed = recover(make_job(model, memory=memory), masks, weights)

    class Killed(BaseException):
        pass

    step = learning._Run.step

    def die(self: Any, *args: Any) -> Any:
        if self.scalars.step > killed_after:
            raise Killed
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(learning._Run, "step", die)
        with pytest.raises(Killed):
            recover(make_job(model, tmp_path, memory=memory), masks, weights)
    job = make_job(model, tmp_path, memory=memory)
    job.resume = True
    resumed = recover(job, masks, weights)
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)
    assert [record["step"] for record in job.history] == [2, 4, 6]


def test_what_is_kept_of_rows_with_an_odd_number_of_groups() -> None:
    x = torch.arange(1.0, 25.0).reshape(2, 12)
    mask = mask_2to4(torch.randn(2, 12))
    kept = rule_module._kept(x, reference.mask_to_codes(mask))
    assert kept.shape == (2, 8)
    assert torch.equal(kept[:, :6], x[mask].reshape(2, 6)) and not kept[:, 6:].any()


@pytest.fixture(scope="module")
def text(tmp_path_factory: Any) -> Path:
    path: Path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(Path(json.__file__).read_text() * 2)
    return path


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: Any) -> Path:
    output: Path = tmp_path_factory.mktemp("pruned") / "model"
    proxsparse.prune(DEMO, output, method="magnitude")
    return output


@pytest.fixture(scope="module")
def recovered(pruned: Path, text: Path) -> tuple[Path, Any]:
    settings = {**FAST, "steps": 12, "num_calibration_samples": 4}
    result = proxsparse.recover(pruned, DEMO, calibration=text, **settings)
    return pruned.with_name("model-recovered"), result


def test_the_chain_from_prune_to_pack(pruned: Path, recovered: Any, tmp_path: Path) -> None:
    output, result = recovered
    losses = [record["loss"] for record in result.history]
    assert losses[-1] < 0.8 * losses[0]
    before, after = (load_file(d / "model.safetensors") for d in (pruned, output))
    masks, given = Masks.load(output), Masks.load(pruned)
    assert all(torch.equal(masks.codes[name], given.codes[name]) for name in given)
    for name, w in after.items():
        assert w.dtype == before[name].dtype
        if name in masks:
            assert not w[~masks[name]].any() and not torch.equal(w, before[name])
        else:
            assert torch.equal(w, before[name])
    pack(output, tmp_path / "packed")
    unpack(tmp_path / "packed", tmp_path / "unpacked")
    assert all(
        torch.equal(w, after[name])
        for name, w in load_file(tmp_path / "unpacked" / "model.safetensors").items()
    )
    # A packed model recovers as well, and recovery goes on from where it ended.
    again = proxsparse.recover(
        tmp_path / "packed", DEMO, tmp_path / "again", calibration="stdlib", **FAST
    )
    assert again.report["recovered_from"]["recipe"]["method"] == "recover"
    assert math.isfinite(again.history[-1]["loss"])


def test_the_report_says_that_kept_weights_are_not_the_bases(
    pruned: Path, recovered: Any, tmp_path: Path
) -> None:
    output, _ = recovered
    report = json.loads((output / "proxsparse.json").read_text())
    assert report["weights_updated"] is True and report["recipe"]["method"] == "recover"
    assert report["recovered_from"]["id"] == str(pruned)
    assert report["recovered_from"]["recipe"]["method"] == "magnitude"
    found = inspect_model(output, DEMO)
    assert found["num_2to4"] == found["num_layers"] and found["mask_file"] == "matches"
    assert not any(row["kept_bitwise"] for row in found["layers"])
    assert not any(row["negative_zeros"] for row in found["layers"])
    report = apply(DEMO, output, tmp_path / "applied").report
    assert report["mask_from_updated_weights"] is True and report["weights_updated"] is False


def test_a_run_that_was_killed_goes_on(
    pruned: Path, text: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    settings = {"calibration": text, **FAST}
    proxsparse.recover(pruned, DEMO, tmp_path / "one", **settings)

    class Killed(BaseException):
        pass

    step = learning._Run.step

    def die(self: Any, *args: Any) -> Any:
        if self.scalars.step == 3:
            raise Killed
        return step(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(learning._Run, "step", die)
        with pytest.raises(Killed):
            proxsparse.recover(pruned, DEMO, tmp_path / "two", **settings)
    with pytest.raises(ProxsparseError, match="another model, text or settings"):
        proxsparse.recover(pruned, DEMO, tmp_path / "two", resume=True, lr=0.5, **settings)
    proxsparse.recover(pruned, DEMO, tmp_path / "two", resume=True, **settings)
    one, two = (tmp_path / name / "model.safetensors" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()


def other(directory: Path, source: Path, change: Any) -> Path:
    """A copy of a checkpoint with other tensors."""
    directory.mkdir()
    for path in source.iterdir():
        if path.name != "model.safetensors":
            (directory / path.name).write_bytes(path.read_bytes())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


NORM = "model.layers.3.input_layernorm.weight"
UP = "model.layers.3.mlp.up_proj.weight"


def test_a_base_that_it_was_not_made_from_is_refused(
    pruned: Path, tiny_model: Any, text: Path, tmp_path: Path
) -> None:
    def refused(model: Path, base: Path, message: str) -> None:
        with pytest.raises(ProxsparseError, match=message):
            proxsparse.recover(model, base, tmp_path / "out", calibration=text, **FAST)
        assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()

    def scale(name: str) -> Any:
        return lambda tensors: tensors[name].mul_(2)

    refused(pruned, other(tmp_path / "norm", DEMO, scale(NORM)), f"{NORM} differs")
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "tiny")
    tokenizer = load_model(DEMO, torch.device("cpu")).tokenizer
    tokenizer.save_pretrained(tmp_path / "tiny")
    refused(pruned, tmp_path / "tiny", r"was not made from .*: its .* is .*, the base's")
    refused(pruned, pruned, "no dense model to learn from")
    refused(DEMO, DEMO, "no layer of LlamaForCausalLM is 2:4")
    refused(
        other(tmp_path / "torn", pruned, lambda tensors: tensors[UP].fill_(1)),
        *(DEMO, "is not zero where .*proxsparse.masks says that it is pruned"),
    )


def test_kept_weights_may_differ_from_the_bases(pruned: Path, text: Path, tmp_path: Path) -> None:
    """As after SparseGPT; and without a mask file the zeros tell the mask."""
    changed = other(tmp_path / "changed", pruned, lambda tensors: tensors[UP].mul_(2))
    (changed / "proxsparse.masks").unlink()
    result = proxsparse.recover(changed, DEMO, tmp_path / "out", calibration=text, **FAST)
    given = Masks.load(pruned)
    assert torch.equal(result.masks.codes[UP], given.codes[UP])


@pytest.mark.parametrize(
    "setting", [{"ignore": ("q_proj",)}, {"lam": 1.0}, {"random_init": True}, {"targets": ("x",)}]
)
def test_settings_that_a_recovery_has_no_use_for(pruned: Path, setting: Any) -> None:
    with pytest.raises(ProxsparseError, match=f"{next(iter(setting))} is not used by recover"):
        proxsparse.recover(pruned, DEMO, **setting)


def test_recovery_is_no_choice_of_method(tmp_path: Path) -> None:
    with pytest.raises(ProxsparseError, match="unknown method 'recover'"):
        proxsparse.prune(DEMO, tmp_path / "out", method="recover")
