"""The order in which learning sees its data: a function of seed and step, so that runs resume."""

from __future__ import annotations

import torch
from torch import Tensor


class BatchOrder:
    """Which calibration blocks a step sees: a fresh permutation for each pass over the data.

    Args:
        num_samples: blocks there are.
        batch_size: blocks of a step.
        seed: of the permutations.
    """

    def __init__(self, num_samples: int, batch_size: int, seed: int) -> None:
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self._permutations: dict[int, Tensor] = {}

    def indices(self, t: int) -> Tensor:
        """The blocks of step t, counted from 0: int64 [batch_size]."""
        first = t * self.batch_size
        return torch.tensor([self._at(i) for i in range(first, first + self.batch_size)])

    def _at(self, i: int) -> int:
        epoch, position = divmod(i, self.num_samples)
        if epoch not in self._permutations:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._permutations = {epoch: torch.randperm(self.num_samples, generator=generator)}
        return int(self._permutations[epoch][position])
