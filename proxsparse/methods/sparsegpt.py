"""SparseGPT: prune column by column and let the columns that follow make up for the error.

The layer-by-layer baseline that changes the weights it keeps. With `mask_only` the masks it finds
are put on the original weights instead.

Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in
One-Shot", ICML 2023, arXiv:2301.00774, algorithm 1.
"""

from __future__ import annotations

import torch
from torch import Tensor

from proxsparse import ops
from proxsparse.errors import ProxsparseError
from proxsparse.learning.job import Job
from proxsparse.learning.layerwise import Gram, prune_block_by_block
from proxsparse.models.masks import Masks
from proxsparse.models.targets import Target

_COLUMNS = 128  # columns pruned between two updates of the rest


def sparsegpt(job: Job) -> Masks:
    """Masks of SparseGPT; unless mask_only, the model's kept weights are updated in place."""
    masks = Masks()
    original = {t.name: t.weight().clone() for t in job.targets.layers}
    finished = False

    def prune(target: Target, inputs: Gram) -> None:
        w = target.weight()
        if w.dim() == 2:
            new, mask = _prune_matrix(w, inputs.sum, job.options.dampening, target.name)
        else:
            pairs = [
                _prune_matrix(w[e], inputs.sum[e], job.options.dampening, f"{target.name}[{e}]")
                for e in range(w.shape[0])
            ]
            new, mask = (torch.stack(part) for part in zip(*pairs, strict=True))
        masks.add(target, mask)
        target.set_weight_(new)

    try:
        prune_block_by_block(job.model, job.targets, job.tokens, Gram, prune)
        finished = True
    finally:
        if job.options.mask_only or not finished:
            for target in job.targets.layers:
                target.set_weight_(original[target.name])
    return masks


def _prune_matrix(w: Tensor, gram: Tensor, dampening: float, name: str) -> tuple[Tensor, Tensor]:
    """The updated weight [N, K] in w's dtype and its mask."""
    work = w.float()
    columns = work.shape[1]
    dead = gram.diagonal() == 0  # inputs that are always zero: their weights do nothing
    if dead.all():  # an expert that no token reached: what it would do is not known, so keep it
        return ops.project_2to4(w), ops.mask_2to4(w)
    gram = gram + torch.diag(dead.to(gram.dtype))
    work = torch.where(dead, 0.0, work)
    gram.diagonal().add_(dampening * gram.diagonal().mean())
    upper = _inverse_cholesky(gram, name)
    mask = torch.zeros_like(work, dtype=torch.bool)
    for start in range(0, columns, _COLUMNS):
        end = min(start + _COLUMNS, columns)
        block, errors = work[:, start:end].clone(), torch.zeros_like(work[:, start:end])
        inverse = upper[start:end, start:end]
        diagonal = inverse.diagonal()
        for i in range(end - start):
            if i % 4 == 0:
                saliency = block[:, i : i + 4].square() / diagonal[i : i + 4].square()
                mask[:, start + i : start + i + 4] = ops.mask_2to4(saliency)
            column = block[:, i]
            kept = torch.where(mask[:, start + i], column, 0.0)
            errors[:, i] = (column - kept) / diagonal[i]
            block[:, i:] -= errors[:, i, None] * inverse[i, i:]
            block[:, i] = kept
        work[:, start:end] = block
        work[:, end:] -= errors @ upper[start:end, end:]
    return torch.where(mask, work, 0.0).to(w.dtype), mask


def _inverse_cholesky(gram: Tensor, name: str) -> Tensor:
    """The upper Cholesky factor of gram's inverse.

    Raises:
        ProxsparseError: the inputs are so collinear that float32 cannot factor their Gram matrix.
    """
    try:
        inverse = torch.cholesky_inverse(torch.linalg.cholesky(gram))
        factor: Tensor = torch.linalg.cholesky(inverse, upper=True)
    except RuntimeError as error:
        raise ProxsparseError(
            f"SparseGPT cannot invert the Hessian of {name} ({error}): give more calibration "
            "samples or a larger --dampening"
        ) from error
    return factor
