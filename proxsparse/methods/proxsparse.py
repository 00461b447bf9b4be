"""ProxSparse: AdamW on the weights, and the proximal operator of R after each step.

The paper's solver EnumALM finds the proximal point by coordinate descent; ours is exact, see
`reference.prox_2to4`. What is learned is thrown away but for the mask: kept weights are the
originals.

The paper has one lr and one lam for all layers. The right ones depend on the scale of a model's
weights, which is why its lam differ by 125 times between models, and why a model of another scale
is ruined by them. So by default both are in units of a layer's weights, whose root mean square is
sigma: lr is `_LR` sigma, and lam grows linearly to `_LAM` / sigma (the proximal point depends on
lam sigma alone). Given a lam, or a preset, the method is the published one in every respect.

Source: Liu et al., "ProxSparse: Regularized Learning of Semi-Structured Sparsity Masks for
Pretrained LLMs", ICML 2025, arXiv:2502.00258, algorithm 1.
"""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

from proxsparse import ops
from proxsparse.config import LearnConfig, ProxSparseOptions
from proxsparse.errors import ProxsparseError
from proxsparse.learning import distributed
from proxsparse.learning.job import Job
from proxsparse.learning.loop import learn
from proxsparse.learning.rule import Rule, State, StepScalars
from proxsparse.models.masks import Masks
from proxsparse.models.targets import Target

# Bytes per weight beside the parameter: the original weight, m, v and the gradient. The global norm
# that the paper clips needs all gradients at once, so there is no mode that never holds them.
MEMORY = {"fast": 4 * 4.0, "balanced": 4 * 2.0}

_LR = 0.03  # of a layer, relative to sigma
_LAM = 0.03  # in the end, times sigma
_PUBLISHED_LR = 1e-4


class _ProxAdamW(Rule):
    def __init__(self, learn_config: LearnConfig, options: ProxSparseOptions) -> None:
        learn_config, self.options = resolve(learn_config, options)
        assert learn_config.lr is not None and learn_config.lam is not None
        self.max_grad_norm = options.max_grad_norm
        self.lam, self.lr = learn_config.lam, learn_config.lr
        self.distils = self.is_relative = self.options.lam_units == "weights"

    def start(self, target: Target, w0: Tensor) -> State:
        p = target.weight().detach().contiguous()  # the parameter itself, unless stored transposed
        unit = w0.new_ones((), dtype=torch.float64)
        if self.is_relative:
            unit = _rms(w0, target.shape)
        return {"p": p, "m": torch.zeros_like(p), "v": torch.zeros_like(p), "unit": unit}

    def lam_at(self, progress: float, lr: float) -> float:
        if self.is_relative:
            return self.lam * progress
        return self.lam if self.options.lam_scaling == "raw" else self.lam * lr / self.lr

    def weight_(self, w0: Tensor, state: State, out: Tensor) -> None:
        if state["p"].data_ptr() != out.data_ptr():
            out.copy_(state["p"])

    def update_(
        self, w0: Tensor, state: State, grad: Tensor, scalars: StepScalars, out: Tensor | None
    ) -> None:
        ops.prox_adamw_(
            state["p"],
            grad,
            state["m"],
            state["v"],
            step=scalars.step,
            lr=scalars.lr * state["unit"],
            lam=scalars.lam / state["unit"],
            grad_scale=scalars.grad_scale,
            w0=w0 if self.options.lam2 != 0 else None,
            lam2=self.options.lam2,
            reg_eps=self.options.reg_eps,
        )
        if out is not None:
            self.weight_(w0, state, out)

    def variable(self, w0: Tensor, state: State) -> Tensor:
        return state["p"]


def resolve(
    learn_config: LearnConfig, options: ProxSparseOptions
) -> tuple[LearnConfig, ProxSparseOptions]:
    """The settings with their units, and with lr and lam where they are not given.

    Raises:
        ProxsparseError: absolute units without a lam.
    """
    units = options.lam_units
    if units == "auto":
        units = "weights" if learn_config.lam is None else "absolute"
    if units == "absolute" and learn_config.lam is None:
        raise ProxsparseError(
            "--lam-units absolute has no lam of its own, as the right one depends on the model: "
            "give --lam or a --preset"
        )
    default_lr = _LR if units == "weights" else _PUBLISHED_LR
    lr = default_lr if learn_config.lr is None else learn_config.lr
    lam = _LAM if learn_config.lam is None else learn_config.lam
    learn_config = dataclasses.replace(learn_config, lr=lr, lam=lam)
    return learn_config, dataclasses.replace(options, lam_units=units)


def _rms(w0: Tensor, shape: tuple[int, ...]) -> Tensor:
    """The root mean square of a layer over all processes, a 0-d float64 tensor.

    At least the smallest normal float32, so that a layer of zeros has a unit as well.
    """
    square = distributed.sum_over_processes(w0.float().square().sum(dtype=torch.float64))
    return (square / math.prod(shape)).sqrt().clamp_min(torch.finfo(torch.float32).tiny)


def proxsparse(job: Job) -> Masks:
    """Learn masks by the proximal operator on the weights."""
    return learn(job, _ProxAdamW(job.learn, job.options))
