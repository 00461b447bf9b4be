"""ProxSparse, as published: AdamW on the weights, and the proximal operator of R after each step.

The paper's solver EnumALM finds the proximal point by coordinate descent; ours is exact, see
`reference.prox_2to4`. What is learned is thrown away but for the mask: kept weights are the
originals.

The right lam depends on the scale of a model's weights, which is why the published settings differ
by 125 times between models; they ship as presets. `gates` has no such unit.

Source: Liu et al., "ProxSparse: Regularized Learning of Semi-Structured Sparsity Masks for
Pretrained LLMs", ICML 2025, arXiv:2502.00258, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from proxsparse import ops
from proxsparse.config import LearnConfig, ProxSparseConfig
from proxsparse.learning.job import Job
from proxsparse.learning.loop import learn
from proxsparse.learning.rule import Rule, State, StepScalars
from proxsparse.models.masks import Masks
from proxsparse.models.targets import Target

# Bytes per weight beside the parameter: the original weight, m, v and the gradient. The global norm
# that the paper clips needs all gradients at once, so there is no mode that never holds them.
MEMORY = {"fast": 4 * 4.0, "balanced": 4 * 2.0}


class _ProxAdamW(Rule):
    lr = 1e-4
    lam = 0.25

    def __init__(self, learn_config: LearnConfig, options: ProxSparseConfig) -> None:
        self.options = options
        self.max_grad_norm = options.max_grad_norm
        self.peak = self.lr if learn_config.lr is None else learn_config.lr
        if learn_config.lam is not None:
            self.lam = learn_config.lam

    def start(self, target: Target, w0: Tensor) -> State:
        p = target.weight().detach().contiguous()  # the parameter itself, unless stored transposed
        return {"p": p, "m": torch.zeros_like(p), "v": torch.zeros_like(p)}

    def lam_at(self, progress: float, lr: float) -> float:
        return self.lam if self.options.lam_scaling == "raw" else self.lam * lr / self.peak

    def weight_(self, w0: Tensor, state: State, out: Tensor) -> None:
        if state["p"].data_ptr() != out.data_ptr():
            out.copy_(state["p"])

    def update_(
        self, w0: Tensor, state: State, grad: Tensor, moment: StepScalars, out: Tensor | None
    ) -> None:
        ops.prox_adamw_(
            state["p"],
            grad,
            state["m"],
            state["v"],
            step=moment.step,
            lr=moment.lr,
            lam=moment.lam,
            grad_scale=moment.grad_scale,
            w0=w0 if self.options.lam2 != 0 else None,
            lam2=self.options.lam2,
            reg_eps=self.options.reg_eps,
        )
        if out is not None:
            self.weight_(w0, state, out)

    def variable(self, state: State) -> Tensor:
        return state["p"]


def proxsparse(job: Job) -> Masks:
    """Learn masks as the paper does."""
    return learn(job, _ProxAdamW(job.learn, job.options))
