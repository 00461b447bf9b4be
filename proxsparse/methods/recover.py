"""Recovery: the kept weights of a pruned model learn on, towards the dense model.

No method that chooses masks: the mask is given and stays. The kept weights are trained by AdamW on
the KL divergence from the dense model, whose weights are the ones that the loop calls w0.

Only kept weights have states. They are held packed, as `ops.pack_2to4` gives them, so a pruned
weight has nothing that could move: it is +0.0 whenever the weight is made. That halves what is kept
per weight, and affords float32 for the weights themselves, where a step at bfloat16 would be lost
in rounding. And since the weight is made from the packed one, the parameter can stay the dense
model's: where memory is short, teacher and student share it, see `streaming.weights_on_demand`.

The learning rate is in units of a layer's kept weights, their root mean square: what suits a
weight of 0.05 ruins one of 0.005.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from proxsparse import ops
from proxsparse.config import LearnConfig
from proxsparse.learning import distributed
from proxsparse.learning.job import Job
from proxsparse.learning.loop import learn
from proxsparse.learning.rule import Rule, State, StepScalars
from proxsparse.models.masks import Masks
from proxsparse.models.targets import Target
from proxsparse.ops import reference

# Bytes per weight beside the parameter: of half the weights a float32 value, m and v, of all of
# them half a byte of code per group; in fast also the original weight.
MEMORY = {"fast": 4 + (4 + 4 + 4) / 2 + 1 / 8, "balanced": (4 + 2 + 2) / 2 + 1 / 8}


class _Recovery(Rule):
    lr = 0.015
    betas = (0.9, 0.95)
    starts_pruned = True

    def __init__(
        self, learn_config: LearnConfig, masks: Masks, weights: Mapping[str, Tensor]
    ) -> None:
        self.masks, self.weights = masks, weights
        self.dtype = torch.bfloat16 if learn_config.memory == "balanced" else torch.float32
        self.on_demand = learn_config.memory == "balanced" and distributed.world_size() == 1
        self.learned: dict[str, Tensor] = {}

    def start(self, target: Target, w0: Tensor) -> State:
        mask = distributed.own_rows(self.masks[target.parameter_name]).to(w0.device)
        codes = reference.mask_to_codes(mask)
        wide = torch.promote_types(w0.dtype, torch.float32)
        weight = distributed.own_rows(self.weights[target.name]).to(w0.device, wide)
        p = _kept(weight, codes)
        square = distributed.sum_over_processes(p.square().sum(dtype=torch.float64))
        # Half of the weights are kept. A layer of zeros has a unit as well.
        unit = (square / (self.masks[target.parameter_name].numel() / 2)).sqrt()
        return {
            "p": p,
            "m": torch.zeros_like(p, dtype=self.dtype),
            "v": torch.zeros_like(p, dtype=self.dtype),
            "codes": codes,
            "unit": unit.clamp_min(torch.finfo(torch.float32).tiny),
        }

    def lam_at(self, progress: float, lr: float) -> float:
        return 0.0

    def weight_(self, w0: Tensor, state: State, out: Tensor) -> None:
        out.copy_(self._unpacked(w0, state, out.dtype))

    def update_(
        self, w0: Tensor, state: State, grad: Tensor, scalars: StepScalars, out: Tensor | None
    ) -> None:
        # With lam 0 the proximal step is the identity, and the op is AdamW in one pass.
        ops.prox_adamw_(
            state["p"],
            _kept(grad, state["codes"]),
            state["m"],
            state["v"],
            step=scalars.step,
            lr=scalars.lr * state["unit"],
            lam=scalars.lam,
            grad_scale=scalars.grad_scale,
            betas=self.betas,
        )
        if out is not None:
            self.weight_(w0, state, out)

    def variable(self, w0: Tensor, state: State) -> Tensor:
        return self._unpacked(w0, state, state["p"].dtype)

    def score(self, w0: Tensor, state: State, weight: Tensor) -> Tensor:
        # A kept weight may be zero, so the weight does not tell its mask.
        return reference.codes_to_mask(state["codes"], w0.shape[-1]).to(weight.dtype)

    @staticmethod
    def _unpacked(w0: Tensor, state: State, dtype: torch.dtype) -> Tensor:
        values = state["p"][..., : w0.shape[-1] // 2].to(dtype)
        return ops.unpack_2to4(values, state["codes"])


def _kept(x: Tensor, codes: Tensor) -> Tensor:
    """The elements of x [..., K] that are kept, [..., 4 * ceil(K/8)].

    Two of each group, in order of position; where the codes end in an empty half byte, two more
    that mean nothing, so that the result is in groups of four as well.
    """
    nibbles = torch.stack((codes & 15, codes >> 4), -1).flatten(-2)
    places = torch.stack((nibbles & 3, nibbles >> 2), -1).long()
    groups = torch.nn.functional.pad(x, (0, 4 * nibbles.shape[-1] - x.shape[-1]))
    return groups.reshape(*nibbles.shape, 4).gather(-1, places).flatten(-2)


def resolve(learn_config: LearnConfig, options: Any) -> tuple[LearnConfig, Any]:
    """The settings with lr, where it is not given; there is no lam."""
    lr = _Recovery.lr if learn_config.lr is None else learn_config.lr
    return dataclasses.replace(learn_config, lr=lr), options


def recover(job: Job, masks: Masks, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Train the kept weights of a pruned model towards the dense one.

    Args:
        job: its model is the dense one, before and after.
        masks: which weights are kept.
        weights: target name -> the weight [N, K] or [E, N, K] to begin with, whole, in any dtype.

    Returns:
        Target name -> the learned weight on the CPU, +0.0 where it is pruned, in the dtype of the
        job's model; whole in each process.
    """
    rule = _Recovery(job.learn, masks, weights)
    learn(job, rule)
    return rule.learned
