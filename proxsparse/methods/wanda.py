"""Wanda: keep the two weights of each group with the largest |W_ik| * ||X_k||.

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", ICLR 2024,
arXiv:2306.11695, equation 1.
"""

from __future__ import annotations

from proxsparse import ops
from proxsparse.learning.job import Job
from proxsparse.learning.layerwise import InputNorm, prune_block_by_block
from proxsparse.models.masks import Masks
from proxsparse.models.targets import Target


def wanda(job: Job) -> Masks:
    """Top two importances of each group, each block seeing the pruned blocks before it."""
    masks = Masks()
    original = {t.name: t.weight().clone() for t in job.targets.layers}

    def prune(target: Target, inputs: InputNorm) -> None:
        w = target.weight()
        score = w.abs().float() * inputs.norm().unsqueeze(-2)
        masks.add(target, ops.mask_2to4(score))
        target.set_weight_(ops.project_2to4(w, score))

    try:
        prune_block_by_block(job.model, job.targets, job.tokens, InputNorm, prune)
    finally:
        for target in job.targets.layers:
            target.set_weight_(original[target.name])
    return masks
