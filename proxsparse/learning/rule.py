"""What a learned method adds to the loop: the state of a layer, and how one step changes it."""

from __future__ import annotations

import abc
from dataclasses import dataclass

from torch import Tensor

from proxsparse.models.targets import Target

State = dict[str, Tensor]


@dataclass(frozen=True)
class StepScalars:
    """Where in the run a step is, as 0-d tensors; of a captured step, on the GPU.

    Attributes:
        step: its number, from 1; float64, as the next two.
        lr: its learning rate: linear warm-up over 10 % of the steps, then linear decay to 0.
        lam: its proximal strength, see `Rule.lam_at`.
        grad_scale: factor on the gradients, from clipping; on the model's device.
    """

    step: Tensor
    lr: Tensor
    lam: Tensor
    grad_scale: Tensor


class Rule(abc.ABC):
    """What a learned method adds to the loop.

    Weights and gradients come as [N, K] or [E, N, K]; `w0` is the layer's original weight. On a GPU
    a step may be captured as a CUDA graph, so what `update_` and `weight_` decide depends on shapes
    and settings only, and what changes from step to step is in tensors.

    Attributes:
        lr: the default peak learning rate.
        distils: the loss is the KL divergence from the dense model, else the cross-entropy of the
            next token.
        starts_pruned: the model computes with whole masks from the first step, so that a loss above
            that of the first steps means that learning has diverged.
        max_grad_norm: if not None, the global norm of the gradients is clipped to this, for which
            all of them have to exist at once.
        on_demand: the model keeps w0 and its weights are made block by block, when they are needed;
            else it holds the current ones, and w0 is a copy. Not together with max_grad_norm.
        learned: if not None, target name -> the weight in the end, whole and on the CPU, which the
            loop puts here; else it is thrown away.
    """

    lr: float
    distils: bool = True
    starts_pruned: bool = False
    max_grad_norm: float | None = None
    on_demand: bool = False
    learned: dict[str, Tensor] | None = None

    @abc.abstractmethod
    def start(self, target: Target, w0: Tensor) -> State:
        """The state of a layer before the first step; saved in checkpoints, restored in place."""

    @abc.abstractmethod
    def lam_at(self, progress: float, lr: float) -> float:
        """The proximal strength of a step of learning rate `lr`.

        `progress` is the share of the run that lies before it, in [0, 1).
        """

    @abc.abstractmethod
    def weight_(self, w0: Tensor, state: State, out: Tensor) -> None:
        """Write the weight to compute with into `out`.

        `out` is like w0, and not contiguous where the model stores the transpose.
        """

    @abc.abstractmethod
    def update_(
        self, w0: Tensor, state: State, grad: Tensor, scalars: StepScalars, out: Tensor | None
    ) -> None:
        """One step: change the state in place, and write the new weight if `out` is given."""

    @abc.abstractmethod
    def variable(self, w0: Tensor, state: State) -> Tensor:
        """The tensor that the regulariser drives to 2:4."""

    def score(self, w0: Tensor, state: State, weight: Tensor) -> Tensor:
        """What decides the mask, like `weight`, which is what `weight_` writes: by default that.

        The two of largest magnitude in each group are kept.
        """
        return weight
