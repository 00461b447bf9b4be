"""How much memory a learning run takes, told before it is taken; and which mode fits.

An estimate, not a promise: weights and states are counted exactly, activations by the inputs and
outputs of the linear layers, and the rest of an allocator's habits not at all.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from proxsparse.errors import ProxsparseError
from proxsparse.learning.loss import LOGITS_AT_ONCE
from proxsparse.models.positions import text_config
from proxsparse.models.precision import SMALL_MODEL
from proxsparse.models.targets import Target, Targets

_log = logging.getLogger(__name__)

_ROOM = 0.9  # share of the free memory that automatic choice will fill


@dataclasses.dataclass(frozen=True)
class Estimate:
    """The parts of a run's peak memory, in bytes.

    Attributes:
        mode: fast, balanced or low.
        weights: the model, every parameter in the dtype that the mode computes in.
        states: what the method keeps per pruned weight, and the masks of the last record.
        work: one gradient, and the weights of the block that runs.
        activations: what is kept for the backward pass.
        logits: a piece of them, those of the dense model and their gradients, and what enters the
            head in both.
    """

    mode: str
    weights: float
    states: float
    work: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """Bytes in all."""
        parts = dataclasses.asdict(self)
        return float(sum(value for name, value in parts.items() if name != "mode"))

    def __str__(self) -> str:
        parts = {k: v for k, v in dataclasses.asdict(self).items() if k != "mode"}
        listed = ", ".join(f"{name} {_gb(value)}" for name, value in parts.items())
        return f"--memory {self.mode} takes about {_gb(self.total)} ({listed})"


def estimate_memory(
    model: nn.Module,
    targets: Targets,
    mode: str,
    states_per_weight: float,
    num_tokens: int,
    device: torch.device,
    num_processes: int = 1,
) -> Estimate:
    """The memory of one step. Reads shapes only, so a model on the meta device will do.

    Args:
        model: the model.
        targets: what is pruned.
        mode: fast, balanced or low.
        states_per_weight: bytes that the method keeps per pruned weight beside the parameter.
        num_tokens: in a step of one process.
        device: where it will run.
        num_processes: that share weights and states; the memory is that of one.
    """
    lean = mode != "fast"
    own = targets.layers[0].parameter.element_size()
    width = own if lean else 4
    # Float32 models compute in bfloat16 on a GPU.
    act = 2 if device.type == "cuda" else width
    config = text_config(model)
    hidden, vocab = _hidden_size(config, targets), int(config.vocab_size)
    blocks: list[list[Target]] = [[] for _ in targets.blocks]
    for target in targets.layers:
        if target.block < len(blocks):
            blocks[target.block].append(target)
    per_block = [num_tokens * (_features(b, config) * act + 16 * hidden) for b in blocks]
    pruned = sum(t.parameter.numel() for t in targets.layers)
    largest = max(t.parameter.numel() for t in targets.layers)
    block = max(sum(t.parameter.numel() for t in b) for b in blocks)
    logits = num_tokens * vocab
    return Estimate(
        mode=mode,
        weights=width * sum(p.numel() for p in model.parameters()) / num_processes,
        states=pruned * (states_per_weight + 1 / 8) / num_processes,
        work=width * (2 * largest + (block if lean else 0)),
        activations=max(per_block) + num_tokens * hidden * act * len(blocks)
        if lean
        else sum(per_block),
        logits=min(logits, LOGITS_AT_ONCE) * (24 + 2 * act) + 3 * num_tokens * hidden * act,
    )


def _hidden_size(config: Any, targets: Targets) -> int:
    size = getattr(config, "hidden_size", None)
    return int(size) if size else min(targets.layers[0].shape[-2:])


def _features(block: list[Target], config: Any) -> int:
    """Numbers per token that the linear layers of a block read and write."""
    experts = getattr(config, "num_experts_per_tok", None) or 1
    return sum(sum(t.shape[-2:]) * (experts if len(t.shape) == 3 else 1) for t in block)


def available_memory(device: torch.device, model: nn.Module) -> float:
    """Bytes that a run may take on `device`: what is free, and what the model occupies already."""
    here = sum(
        p.numel() * p.element_size() for p in model.parameters() if p.device.type == device.type
    )
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(here + cached + torch.cuda.mem_get_info(device)[0])
    import psutil

    return float(here + psutil.virtual_memory().available)


def choose_memory(
    model: nn.Module,
    targets: Targets,
    wanted: str,
    modes: Mapping[str, float],
    num_tokens: int,
    device: torch.device,
    num_processes: int = 1,
) -> str:
    """The mode to run in; what it will take goes to the log.

    Args:
        model: the model; the meta device will do.
        targets: what is pruned.
        wanted: auto, or one of the modes.
        modes: mode -> bytes of states per pruned weight, the fastest first; what the method can do.
        num_tokens: in a step of one process.
        device: where it will run.
        num_processes: that share weights and states.

    Raises:
        ProxsparseError: the method has no such mode; it does not fit, and which one would.
    """
    if wanted != "auto" and wanted not in modes:
        raise ProxsparseError(
            f"--memory {wanted} is not possible with this method, only {', '.join(modes)}: "
            "choose one of these, or method gates"
        )
    budget = available_memory(device, model)
    estimates = {
        mode: estimate_memory(model, targets, mode, per_weight, num_tokens, device, num_processes)
        for mode, per_weight in modes.items()
    }
    fitting = [mode for mode, estimate in estimates.items() if estimate.total <= budget]
    if wanted == "auto":
        small = sum(p.numel() for p in model.parameters()) < SMALL_MODEL or device.type == "cpu"
        roomy = [m for m in fitting if estimates[m].total <= _ROOM * budget]
        preferred = [m for m in roomy if m != "fast" or small]
        wanted = next(
            iter(preferred or roomy or fitting or [min(estimates, key=_total(estimates))])
        )
    estimate = estimates[wanted]
    if wanted not in fitting:
        way_out = f"--memory {fitting[0]} fits" if fitting else "no mode fits"
        raise ProxsparseError(
            f"{estimate}, but {device} has {_gb(budget)}: {way_out}; a smaller --batch-size or "
            "--max-seq-length needs less"
        )
    _log.info("%s of the %s on %s", estimate, _gb(budget), device)
    return wanted


def _total(estimates: Mapping[str, Estimate]) -> Any:
    return lambda mode: estimates[mode].total


def memory_gb(device: torch.device) -> float:
    """In GB: on a GPU the most that tensors have taken so far, on a CPU what the process holds."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 1e9, 3)
    import psutil

    info = psutil.Process().memory_info()
    return float(round(info.rss / 1e9, 3))


def _gb(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.3g} GB" if num_bytes >= 1e9 else f"{num_bytes / 1e6:.0f} MB"
