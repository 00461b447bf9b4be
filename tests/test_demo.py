"""What the demo leaves in its output; its figures are CI's."""

from __future__ import annotations

import json
from pathlib import Path

import torch

import proxsparse
from proxsparse.jobs import demo
from proxsparse.jobs.inspect import inspect_model
from proxsparse.models.loading import load_model
from proxsparse.models.masks import Masks
from proxsparse.models.targets import find_targets
from proxsparse.ops import mask_2to4


def test_the_output_is_a_pruned_checkpoint_that_names_no_path(tmp_path: Path) -> None:
    base = load_model(Path(proxsparse.__file__).parent / "demo_model", torch.device("cpu"))
    targets, masks = find_targets(base.model), Masks()
    for target in targets.layers:
        masks.add(target, mask_2to4(target.weight()))
    history = [{"step": step, "loss": 2.0 / step, "share_2to4": 1.0} for step in (1.0, 2.0)]
    results = {"dense": {"perplexity": 13.0}, "gates": {"perplexity": 18.0}}
    recipe = demo._recipe("gates", quick=True)
    demo._write(tmp_path, base, targets, {"gates": (masks, history)}, results, recipe, 40960)
    report = json.loads((tmp_path / "proxsparse.json").read_text())
    assert report["base"]["id"] == "proxsparse demo model" and report["results"] == results
    assert (tmp_path / "comparison.png").is_file()
    found = inspect_model(tmp_path)
    assert found["num_2to4"] == found["num_layers"] == len(targets.layers)
