"""One process of a job, run by test_distributed.py with `spec` among its globals."""

from __future__ import annotations

import os
from typing import Any

import torch

from proxsparse.errors import ProxsparseError
from proxsparse.jobs.prune import prune
from proxsparse.jobs.recover import recover
from proxsparse.learning import loop as learn

spec: dict[str, Any] = globals()["spec"]
os.environ.update(spec["env"])
torch.set_num_threads(1)
step = learn._Run.step


def dying_step(self: Any, *args: Any) -> Any:
    if self.scalars.step == spec["die_at"]:
        os._exit(9)
    return step(self, *args)


if spec["die_at"] and spec["env"]["RANK"] == "1":
    learn._Run.step = dying_step  # type: ignore[method-assign]
settings = spec["settings"]
try:
    if "pruned" in settings:
        recover(settings.pop("pruned"), spec["config"], spec["output"], **settings)
    else:
        prune(spec["config"], spec["output"], random_init=True, **settings)
except ProxsparseError as error:
    with open(f"{spec['output']}.error-{spec['env']['RANK']}", "w") as file:
        file.write(f"{type(error).__name__}: {error}")
