"""Gates, the default: the proximal idea without units.

The weights stay frozen. Each gets a gate s in [0, 1], and the gates are driven to 2:4 by the
proximal operator in the metric A, Wanda's importance to the power 1.5 and scaled to RMS 1 in each
group of four.
A group then has the same scale in every layer of every model, so one lam serves all of them. Its
strength grows linearly from 0: the loss decides first, the constraint later.

From the first step on the model computes with the mask that the gates stand for, the top two A*s of
each group, while the gradient is taken as if it were W0*s (a straight-through estimate, which
reaches pruned weights too and lets them return). So nothing changes when the mask is made final;
computing with W0*s instead leaves a tenth more of the loss, see benchmarks/results/NOTES.md.

The weight is a function of W0 and the gates, so where memory is short it is not kept: each block
makes its own when it runs (`streaming.weights_on_demand`), and the states are bfloat16 or 8-bit.
"""

from __future__ import annotations

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from proxsparse import ops
from proxsparse.config import LearnConfig
from proxsparse.learning import distributed
from proxsparse.learning.job import Job
from proxsparse.learning.layerwise import collect_input_norms
from proxsparse.learning.loop import learn
from proxsparse.learning.rule import Rule, State, StepScalars
from proxsparse.models.masks import Masks
from proxsparse.models.targets import Target
from proxsparse.ops import reference

_PRIOR_SAMPLES = 128  # blocks behind the activation norms, as many as Wanda's
# Bytes per weight beside the parameter: s, m and v; in fast also the original weight.
MEMORY = {"fast": 4 + 3 * 4.0, "balanced": 3 * 2.0, "low": 3 + 8 / reference.QUANTUM_BLOCK}


class _Gates(Rule):
    lr = 0.06
    lam = 3.0
    betas = (0.8, 0.999)
    starts_pruned = True

    def __init__(self, learn_config: LearnConfig, norms: dict[str, Tensor]) -> None:
        self.norms = norms
        self.memory, self.seed = learn_config.memory, learn_config.seed
        # Of several processes each keeps its rows twice; what they compute with is gathered.
        self.on_demand = self.memory in ("balanced", "low") and distributed.world_size() == 1
        learn_config, _ = resolve(learn_config, None)
        assert learn_config.lr is not None and learn_config.lam is not None
        self.lam_per_step = learn_config.lr * learn_config.lam

    def start(self, target: Target, w0: Tensor) -> State:
        def full(value: int, dtype: torch.dtype) -> Tensor:
            return torch.full(w0.shape, value, dtype=dtype, device=w0.device)

        norm = self.norms[target.name]
        state = {"act_norm": distributed.own_rows(norm) if norm.dim() > 1 else norm}
        if self.memory != "low":
            dtype = torch.bfloat16 if self.memory == "balanced" else w0.dtype
            return state | {"s": full(1, dtype), "m": full(0, dtype), "v": full(0, dtype)}
        blocks = math.ceil(w0.shape[-2] * w0.shape[-1] / reference.QUANTUM_BLOCK)
        return state | {
            "s": full(255, torch.uint8),
            "m": full(0, torch.int8),
            "v": full(0, torch.uint8),
            "scales": torch.zeros(*w0.shape[:-2], blocks, 2, device=w0.device),
            # No two layers round alike. On the CPU, so that reading it never waits for a GPU.
            "seed": torch.tensor(zlib.crc32(f"{self.seed}/{target.name}".encode()) >> 1),
        }

    def lam_at(self, progress: float, lr: float) -> float:
        return self.lam_per_step * progress

    def weight_(self, w0: Tensor, state: State, out: Tensor) -> None:
        _fill(out, lambda x: ops.gate_project_(state["s"], w0, state["act_norm"], x))

    def update_(
        self, w0: Tensor, state: State, grad: Tensor, scalars: StepScalars, out: Tensor | None
    ) -> None:
        def step(out: Tensor | None) -> None:
            ops.gate_update_(
                state["s"],
                grad,
                w0,
                state["m"],
                state["v"],
                state["act_norm"],
                step=scalars.step,
                lr=scalars.lr,
                lam=scalars.lam,
                grad_scale=scalars.grad_scale,
                betas=self.betas,
                out=out,
                hard=True,
                scales=state.get("scales"),
                seed=int(state["seed"]) if "seed" in state else 0,
            )

        if out is None:
            step(None)
        else:
            _fill(out, step)

    def variable(self, w0: Tensor, state: State) -> Tensor:
        return state["s"]


def resolve(learn_config: LearnConfig, options: Any) -> tuple[LearnConfig, Any]:
    """The settings with lr and lam, where they are not given."""
    lr = _Gates.lr if learn_config.lr is None else learn_config.lr
    lam = _Gates.lam if learn_config.lam is None else learn_config.lam
    return dataclasses.replace(learn_config, lr=lr, lam=lam), options


def _fill(out: Tensor, write: Callable[[Tensor], None]) -> None:
    """Let `write` fill `out`, through a contiguous tensor where the model stores the transpose."""
    if out.is_contiguous():
        write(out)
    else:
        buffer = torch.empty_like(out, memory_format=torch.contiguous_format)
        write(buffer)
        out.copy_(buffer)


def gates(job: Job) -> Masks:
    """Learn masks through gates on frozen weights."""
    norms = collect_input_norms(job.model, job.targets, job.tokens[:_PRIOR_SAMPLES])
    return learn(job, _Gates(job.learn, norms))
