"""What pruning cost: perplexity on text that the masks were not chosen on, before and after."""

from __future__ import annotations

from typing import Any

from torch import nn

from proxsparse.data.calibration import Calibration
from proxsparse.jobs.evaluate import evaluate_perplexity
from proxsparse.models.precision import computing_in, resolve_dtype

_TOKENS_AT_ONCE = 4096


class Quality:
    """Measures a model on the held-out blocks of its calibration text, first dense, then pruned.

    Args:
        model: the model, whole and on the device to measure on.
        data: the calibration, of which `held_out` is measured on.
        dtype: as `RunConfig.dtype`.

    Attributes:
        dense: the perplexity of the dense model.
    """

    def __init__(self, model: nn.Module, data: Calibration, dtype: str) -> None:
        self._model, self._data, self._dtype = model, data, dtype
        self.dense = self._perplexity()

    def compare(self) -> dict[str, Any]:
        """The figures, once the model is pruned.

        Returns:
            {"perplexity", "perplexity_dense", "tokens": how many were scored on, "source"}.
        """
        assert self._data.held_out is not None
        return {
            "perplexity": self._perplexity(),
            "perplexity_dense": self.dense,
            "tokens": self._data.held_out.numel(),
            "source": self._data.source,
        }

    def _perplexity(self) -> float:
        blocks = self._data.held_out
        assert blocks is not None
        batch_size = max(1, _TOKENS_AT_ONCE // blocks.shape[1])
        with computing_in(self._model, resolve_dtype(self._dtype, self._model)):
            return evaluate_perplexity(self._model, blocks, batch_size=batch_size)


def why_not_measured(data: Calibration | None, num_processes: int, is_made: bool) -> str:
    """Why a job has no quality to tell; empty when it has.

    Args:
        data: the calibration of the job, if it has any.
        num_processes: that share the model.
        is_made: whether the model's weights are random.
    """
    if is_made:
        return "the weights are random"
    if data is None:
        return "the method reads no text"
    if num_processes > 1:
        return "the model is shared out to several processes"
    if data.held_out is None:
        return "no calibration text is left that the masks were not chosen on"
    return ""
