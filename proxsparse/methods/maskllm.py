"""MaskLLM: a distribution over the six masks of each group, learned by Gumbel-softmax.

The learned method to compare with. A group has six logits; kappa times them, with Gumbel noise,
through a softmax of temperature tau, weighs the six masks, and the model computes with W0 times
that soft mask. kappa grows and tau falls, so that the masks become hard. The weights stay frozen,
and in the end the mask of the largest logit is taken.

Written from the paper. As published: 4 to 0.05 for tau and 100 to 500 for kappa, linear in the
steps; logits begin at N(0, 0.01) plus a prior of strength 3, SparseGPT's mask; AdamW, lr 1e-3 (the
paper's for small models) and weight decay 0.1; the loss is the next token's cross-entropy minus
1e-5 times the squares of all W0 * M. Ours are the budget (the paper has 2.1 billion tokens), the
loop's schedule of lr, and Adam's betas, about which the paper is silent. This is a reference in
plain PyTorch: a step makes several passes over six numbers a group.

The noise is a hash of seed, step and place. So a step has the same noise wherever its weights are
made, twice where activations are recomputed, and in a run that is resumed.

Source: Fang et al., "MaskLLM: Learnable Semi-Structured Sparsity for Large Language Models",
NeurIPS 2024, arXiv:2409.17481, sections 3.2 and 3.3.
"""

from __future__ import annotations

import dataclasses
import zlib

import torch
from torch import Tensor

from proxsparse.config import LearnConfig, MaskLLMOptions, SparseGPTOptions
from proxsparse.learning.job import Job
from proxsparse.learning.loop import learn
from proxsparse.learning.rule import Rule, State, StepScalars
from proxsparse.methods.sparsegpt import sparsegpt
from proxsparse.models.masks import Masks
from proxsparse.models.targets import Target

# Bytes per weight beside the parameter: 6/4 logits with m and v; in fast also the original weight.
# In bfloat16 most steps of a logit would be lost in rounding, so the logits are float32 always.
MEMORY = {"fast": 4 + 6 / 4 * 12, "balanced": 6 / 4 * (4 + 2 + 2)}

_PRIOR_SAMPLES = 128  # blocks behind SparseGPT's mask, its default
_STD = 0.01
_PRIOR = 3.0
_TAU = (4.0, 0.05)
_KAPPA = (100.0, 500.0)
_WEIGHT_DECAY = 0.1
_PAIRS = ((0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3))
_MASKS = tuple(tuple(float(i in pair) for i in range(4)) for pair in _PAIRS)


class _Categorical(Rule):
    lr = 1e-3
    lam = 1e-5
    betas = (0.9, 0.95)

    def __init__(self, learn_config: LearnConfig, options: MaskLLMOptions, prior: Masks) -> None:
        self.prior, self.seed, self.steps = prior, learn_config.seed, learn_config.steps
        self.distils = options.distil
        self.on_demand = learn_config.memory == "balanced"
        self.dtype = torch.bfloat16 if self.on_demand else None
        learn_config, _ = resolve(learn_config, options)
        assert learn_config.lam is not None
        self.lam = learn_config.lam

    def start(self, target: Target, w0: Tensor) -> State:
        # On the CPU, so that a run begins alike on every device.
        seed = zlib.crc32(f"{self.seed}/{target.name}".encode())
        shape = (*target.shape[:-1], target.shape[-1] // 4, 6)
        logits = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * _STD
        # Places in common with SparseGPT's mask, less the mean over the six masks.
        mask = self.prior[target.parameter_name].float().view(*shape[:-1], 4)
        logits += _PRIOR * _STD * (mask @ torch.tensor(_MASKS).T - 1)
        logits = logits.to(w0.device, torch.promote_types(w0.dtype, torch.float32))
        return {
            "logits": logits,
            "m": torch.zeros_like(logits, dtype=self.dtype),
            "v": torch.zeros_like(logits, dtype=self.dtype),
            "step": torch.zeros((), dtype=torch.int64, device=w0.device),
            "seed": torch.tensor(seed, device=w0.device),
            # On the device, because a recorded step cannot fetch it.
            "masks": torch.tensor(_MASKS, dtype=logits.dtype, device=w0.device),
        }

    def lam_at(self, progress: float, lr: float) -> float:
        return self.lam

    def weight_(self, w0: Tensor, state: State, out: Tensor) -> None:
        out.copy_(w0 * self._soft_mask(state, self._probabilities(state)))

    def update_(
        self, w0: Tensor, state: State, grad: Tensor, scalars: StepScalars, out: Tensor | None
    ) -> None:
        y = self._probabilities(state)
        w = w0.to(y.dtype)
        lam = scalars.lam.to(y)
        of_mask = grad.to(y.dtype) * w - 2 * lam * self._soft_mask(state, y) * w.square()
        of_y = of_mask.view(*y.shape[:-1], 4) @ state["masks"].T
        tau, kappa = self._schedules(state)
        g = y * (of_y - (y * of_y).sum(-1, keepdim=True)) * (kappa / tau).to(y.dtype)
        self._adamw_(state, g, scalars)
        state["step"] += 1
        if out is not None:
            self.weight_(w0, state, out)

    def variable(self, w0: Tensor, state: State) -> Tensor:
        return self._soft_mask(state, self._probabilities(state))

    def score(self, w0: Tensor, state: State, weight: Tensor) -> Tensor:
        return state["masks"][state["logits"].argmax(-1)].flatten(-2).to(weight.dtype)

    def _schedules(self, state: State) -> tuple[Tensor, Tensor]:
        """Of the step that comes next, tau and kappa, 0-d float64; after the last, their ends."""
        progress = (state["step"].double() / max(self.steps - 1, 1)).clamp(max=1.0)
        tau, kappa = (first + (last - first) * progress for first, last in (_TAU, _KAPPA))
        return tau, kappa

    def _probabilities(self, state: State) -> Tensor:
        """The weights of the six masks in the step that comes next, [..., K/4, 6]."""
        logits = state["logits"]
        tau, kappa = (x.to(logits.dtype) for x in self._schedules(state))
        # A place in (0, 1) that float32 holds exactly, so that no logarithm is infinite.
        uniform = ((_hash(state, logits) >> 9) + 0.5) / 2**23
        gumbel = -(-uniform.to(logits.dtype).log()).log()
        return ((logits * kappa + gumbel) / tau).softmax(-1)

    @staticmethod
    def _soft_mask(state: State, y: Tensor) -> Tensor:
        """The weighted mean [..., K] of the six masks, by weights [..., K/4, 6]."""
        return (y @ state["masks"]).flatten(-2)

    def _adamw_(self, state: State, g: Tensor, scalars: StepScalars) -> None:
        first, second = self.betas
        step, lr = scalars.step.to(g), scalars.lr.to(g)
        m = state["m"].to(g.dtype).lerp_(g, 1 - first)
        v = state["v"].to(g.dtype).lerp_(g.square(), 1 - second)
        state["m"].copy_(m)
        state["v"].copy_(v)
        direction = m / (1 - first**step) / ((v / (1 - second**step)).sqrt() + 1e-12)
        state["logits"].mul_(1 - lr * _WEIGHT_DECAY).sub_(lr * direction)


def _hash(state: State, like: Tensor) -> Tensor:
    """32 random bits for each element, int64; the same for the same seed, step and place."""
    x = torch.arange(like.numel(), device=like.device).view(like.shape)
    return _mixed(x + _mixed(state["seed"] + _mixed(state["step"])))


def _mixed(x: Tensor) -> Tensor:
    """Each of the low 32 bits decides half of all bits: xor with shifts, and odd factors."""
    low = 0xFFFFFFFF
    x = x & low
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x735A2D97)):
        x = ((x ^ (x >> shift)) * factor) & low
    return x ^ (x >> 15)


def resolve(
    learn_config: LearnConfig, options: MaskLLMOptions
) -> tuple[LearnConfig, MaskLLMOptions]:
    """The settings with lr and lam, where they are not given."""
    lr = _Categorical.lr if learn_config.lr is None else learn_config.lr
    lam = _Categorical.lam if learn_config.lam is None else learn_config.lam
    return dataclasses.replace(learn_config, lr=lr, lam=lam), options


def maskllm(job: Job) -> Masks:
    """Learn masks through Gumbel-softmax on frozen weights, from SparseGPT's."""
    options = SparseGPTOptions(mask_only=True)
    prior = dataclasses.replace(job, options=options, tokens=job.tokens[:_PRIOR_SAMPLES])
    return learn(job, _Categorical(job.learn, job.options, sparsegpt(prior)))
