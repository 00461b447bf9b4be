"""Gates, the default: the proximal idea without units.

The weights stay frozen. Each gets a gate s in [0, 1], and the gates are driven to 2:4 by the
proximal operator in the metric A of Wanda's importance, scaled to RMS 1 within each group of four.
A group then has the same scale in every layer of every model, so one lam serves all of them. Its
strength grows linearly from 0: the loss decides first, the constraint later.

From the first step on the model computes with the mask that the gates stand for, the top two A*s of
each group, while the gradient is taken as if it were W0*s (a straight-through estimate, which
reaches pruned weights too and lets them return). So nothing changes when the mask is made final;
computing with W0*s instead leaves a tenth more of the loss, see benchmarks/results/NOTES.md.
"""

from __future__ import annotations

import torch
from torch import Tensor

from proxsparse import ops, reference
from proxsparse.config import LearnConfig
from proxsparse.layerwise import collect_input_norms
from proxsparse.learn import Job, Moment, Rule, State, learn
from proxsparse.masks import Masks
from proxsparse.targets import Target

_PRIOR_SAMPLES = 128  # blocks behind the activation norms, as many as Wanda's


class _Gates(Rule):
    lr = 0.06
    lam = 1.0

    def __init__(self, learn_config: LearnConfig, norms: dict[str, Tensor]) -> None:
        self.norms = norms
        self.frozen: dict[str, Tensor] = {}
        peak = self.lr if learn_config.lr is None else learn_config.lr
        self.lam_per_step = peak * (self.lam if learn_config.lam is None else learn_config.lam)

    def start(self, target: Target) -> State:
        w0 = target.weight().detach()
        self.frozen[target.name] = w0.clone(memory_format=torch.contiguous_format)
        s = torch.ones_like(self.frozen[target.name])
        norm = self.norms[target.name]
        return {"s": s, "m": torch.zeros_like(s), "v": torch.zeros_like(s), "act_norm": norm}

    def sync_(self, target: Target, state: State) -> None:
        score = self.score(target, state)
        target.set_weight_(ops.project_2to4(self.frozen[target.name], score))

    def update_(self, target: Target, state: State, grad: Tensor, moment: Moment) -> None:
        weight = target.weight().detach()
        in_place = weight.is_contiguous()  # not so where the model stores the transpose
        out = weight if in_place else torch.empty_like(state["s"])
        ops.gate_update_(
            state["s"],
            grad,
            self.frozen[target.name],
            state["m"],
            state["v"],
            state["act_norm"],
            step=moment.step,
            lr=moment.lr,
            lam=self.lam_per_step * moment.progress,
            grad_scale=moment.grad_scale,
            out=out,
            hard=True,
        )
        if not in_place:
            target.set_weight_(out)

    def variable(self, state: State) -> Tensor:
        return state["s"]

    def score(self, target: Target, state: State) -> Tensor:
        return reference.gate_score(self.frozen[target.name], state["s"], state["act_norm"])


def gates(job: Job) -> Masks:
    """Learn masks through gates on frozen weights."""
    norms = collect_input_norms(job.model, job.targets, job.tokens[:_PRIOR_SAMPLES])
    return learn(job, _Gates(job.learn, norms))
