"""Training on under fixed masks: every optimiser, every trainer, several processes, and a check."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.hooks import RemovableHandle

from proxsparse.errors import ProxsparseError
from proxsparse.models.masks import Masks, masks_of, targets_of
from proxsparse.models.targets import Target, check_in_memory
from proxsparse.ops import reference


def keep_masks_(
    model: nn.Module, optimizer: torch.optim.Optimizer, masks: Masks | None = None
) -> RemovableHandle:
    """Keep a model's masks in further training: now and after each step of the optimiser.

    Any optimiser will do: momentum and weight decay may move a pruned weight, but it is +0.0 again
    before the next forward pass. Turn a sparse model dense first, with `densify_`, and sparse again
    afterwards. After a change outside of steps, such as merging a LoRA adapter, call
    `apply_masks_`. For transformers' Trainer there is `mask_callback`.

    Args:
        model: the model that is trained; may be split by FSDP2 (`fully_shard`), if `masks` are
            given.
        optimizer: what updates its weights; also one that `accelerator.prepare`, or another
            library that holds it as `optimizer`, has wrapped.
        masks: which weights stay; default: those that are not zero now, see `masks_of`.

    Returns:
        A handle whose `remove()` lets the pruned weights go.

    Raises:
        ProxsparseError: a mask fits no layer of the model, or none is given and no layer is 2:4.

    Cost: per step one pass over the masked weights; 1 bit per weight on their device.
    """
    innermost = _innermost(optimizer)
    parts = _parts(model, masks)
    _zero_pruned_(parts)
    return innermost.register_step_post_hook(lambda *_: _zero_pruned_(parts))


@torch.no_grad()
def check_masks(model: nn.Module, masks: Masks) -> None:
    """Refuse a model whose pruned weights are not all +0.0, before it is saved for one.

    Args:
        model: the model; of one that is split by FSDP2, each process looks at its own part.
        masks: that it should have.

    Raises:
        ProxsparseError: names the first layer, and how many of its pruned weights came back.
    """
    for part in _parts(model, masks):
        w = part.weight()
        wrong = ((w != 0) | w.signbit()) & ~part.mask(w.device)
        if wrong.any():
            raise ProxsparseError(
                f"{part.target.name} has {int(wrong.sum()):,} pruned weights that are not zero: "
                "something changed them after the optimiser's step; call apply_masks_ before saving"
            )


def mask_callback(masks: Masks | None = None) -> Any:
    """A callback that keeps a model's masks in transformers' Trainer, and in trl's.

        trainer = Trainer(model, args, callbacks=[proxsparse.mask_callback()], ...)

    It calls `keep_masks_` when training begins, and checks with each save, and at the end, that the
    masks held.

    Args:
        masks: as for `keep_masks_`; needed where FSDP splits the model.

    Raises:
        ProxsparseError: when training begins, as `keep_masks_`; when saving, as `check_masks`.
    """
    from transformers import TrainerCallback

    class KeepMasks(TrainerCallback):
        handle: RemovableHandle | None = None
        held: Masks | None = masks

        def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            model, optimizer = _unwrapped(given["model"]), given["optimizer"]
            self.held = masks_of(model) if self.held is None else self.held
            self.handle = keep_masks_(model, optimizer, self.held)

        def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            assert self.held is not None
            check_masks(_unwrapped(given["model"]), self.held)

        def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            assert self.held is not None and self.handle is not None
            self.handle.remove()
            check_masks(_unwrapped(given["model"]), self.held)

    return KeepMasks()


@dataclass(frozen=True)
class _Part:
    """What this process has of a masked weight: all of it, or some rows as they are stored.

    Attributes:
        target: the layer.
        codes: of the part in the order of groups, or None where the part is no whole groups.
        stored: bool, the mask of the stored part, where there are no codes.
    """

    target: Target
    codes: Tensor | None
    stored: Tensor | None

    def weight(self) -> Tensor:
        """The part as it is stored, a detached view."""
        w = self.target.parameter.detach()
        return w.to_local() if isinstance(w, DTensor) else w

    def mask(self, device: torch.device) -> Tensor:
        """Which of it is kept, bool in the stored shape."""
        if self.stored is not None:
            return self.stored
        assert self.codes is not None
        w = self.target.canonical(self.weight())
        kept = reference.codes_to_mask(self.codes.to(device), w.numel()).reshape(w.shape)
        return kept.mT if self.target.transposed else kept


def _parts(model: nn.Module, masks: Masks | None) -> list[_Part]:
    is_split = any(isinstance(p, DTensor) for p in model.parameters())
    if masks is None and is_split:
        raise ProxsparseError(
            f"{type(model).__name__} is split over processes, so its zeros do not show its masks: "
            "take masks_of(model) before it is split, and pass them"
        )
    masks = masks_of(model) if masks is None else masks
    targets = targets_of(model, masks)
    check_in_memory(targets.layers)
    parts = []
    for target in targets.layers:
        name = target.parameter_name
        codes = masks.codes[name]
        if not isinstance(target.parameter, DTensor):
            parts.append(_Part(target, codes.to(target.parameter.device), None))
            continue
        kept = masks[name]
        own = _own_part(kept.mT if target.transposed else kept, target.parameter)
        parts.append(_Part(target, None, own.to(target.parameter.device)))
    return parts


def _own_part(whole: Tensor, parameter: Any) -> Tensor:
    """Of a tensor that every process has whole, the part that `parameter` is of its own whole."""
    mesh, placements = parameter.device_mesh, parameter.placements
    whole = whole.contiguous().to(mesh.device_type)
    # Without a source rank each takes its part of what it has: nothing is sent.
    return distribute_tensor(whole, mesh, placements, src_data_rank=None).to_local()


@torch.no_grad()
def _zero_pruned_(parts: list[_Part]) -> None:
    for part in parts:
        w = part.weight()
        w.masked_fill_(~part.mask(w.device), 0.0)


def _innermost(optimizer: Any) -> torch.optim.Optimizer:
    """The optimiser that steps, under the wrappers of accelerate and its like."""
    while not hasattr(optimizer, "_optimizer_step_post_hooks"):
        inner = getattr(optimizer, "optimizer", None)
        if inner is None:
            raise ProxsparseError(
                f"{type(optimizer).__name__} is no optimiser of torch and holds none as "
                "`optimizer`: pass the one that steps"
            )
        optimizer = inner
    result: torch.optim.Optimizer = optimizer
    return result


def _unwrapped(model: Any) -> Any:
    """The model in the wrapper of DistributedDataParallel or torch.compile."""
    unwrap: tuple[str, ...] = ("_orig_mod", "module")
    while True:
        name = next((n for n in unwrap if isinstance(getattr(model, n, None), nn.Module)), None)
        if name is None:
            return model
        model = getattr(model, name)
