"""What every method receives: the model, its targets, the calibration and the settings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from proxsparse.config import LearnConfig
from proxsparse.learning.checkpoint import Checkpoints
from proxsparse.models.targets import Targets


@dataclass
class Job:
    """One pruning job, as every method receives it.

    Attributes:
        model: the dense model, on its device, in the precision to compute in.
        targets: what to prune.
        tokens: int64 [S, L] calibration blocks, on CPU.
        learn: settings of the loop; layer-by-layer methods ignore it.
        options: the method's own config.
        checkpoints: where to checkpoint; None keeps nothing on disk.
        metrics: path of metrics.jsonl; None keeps the history in memory only.
        resume: continue from the latest checkpoint.
        track: called with every record, for a tracker.
        history: one dict per look at the loss, filled by the loop.
    """

    model: nn.Module
    targets: Targets
    tokens: Tensor
    learn: LearnConfig
    options: Any
    checkpoints: Checkpoints | None = None
    metrics: Path | None = None
    resume: bool = False
    track: Callable[[dict[str, float]], None] | None = None
    history: list[dict[str, float]] = field(default_factory=list)
