"""Magnitude: keep the two largest weights of each group. Needs no data; a table's floor."""

from __future__ import annotations

from proxsparse import ops
from proxsparse.learning.job import Job
from proxsparse.models.masks import Masks


def magnitude(job: Job) -> Masks:
    """Top two |W| of each group."""
    masks = Masks()
    for target in job.targets.layers:
        masks.add(target, ops.mask_2to4(target.weight().detach()))
    return masks
