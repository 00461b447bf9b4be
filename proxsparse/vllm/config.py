"""What vLLM asks of a quantisation method: which layers are ours, and what is refused.

A packed directory names its layers. With `--quantization proxsparse` on a dense checkpoint every
linear layer is looked at once its weights are there, and what is 2:4 is packed.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig

from proxsparse.errors import ProxsparseError
from proxsparse.vllm.names import PackedNames, Summary, check_all_taken

# Below "vllm", because that is the logger that vLLM shows.
log = logging.getLogger("vllm.plugins.proxsparse")

METHOD = "proxsparse"  # what `--quantization` and config.json call it
KNOWN = ((0, 26), (0, 32))  # the oldest and the newest vLLM whose interfaces were looked at
_DENSE_INSTEAD = (
    "`proxsparse unpack DIR DENSE` writes the dense model, which vLLM serves without the plug-in"
)
_EXPERTS = frozenset({"FusedMoE", "RoutedExperts"})


class SparseConfig(QuantizationConfig):  # type: ignore[misc]
    """The plug-in's side of `--quantization proxsparse`.

    Args:
        names: of the packed layers; None packs what is 2:4 of a dense checkpoint.

    Attributes:
        names: as above.
        summary: what became of the layers so far.
    """

    def __init__(self, names: PackedNames | None = None) -> None:
        super().__init__()
        self.names = names
        self.summary = Summary()
        self._num_unfinished = 0
        self._has_all_layers = True
        self._layouts: list[str] = []
        _warn_of_version()

    def get_name(self) -> str:
        """The method's name."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """What activations may be; a GPU takes 16 bits only, which a layer checks."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """None that vLLM should check: `_check_platform` says the way out too."""
        return 0

    @staticmethod
    def get_config_filenames() -> list[str]:
        """No files: all is in config.json."""
        return []

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> SparseConfig:
        """The configuration of a checkpoint.

        Args:
            config: `quantization_config` of its config.json.

        Raises:
            ProxsparseError: it is damaged, of a newer proxsparse, or of weights that are quantised.
        """
        if config.get("quant_method") != METHOD:
            check_dense(config)
            return cls()
        from proxsparse.models.forms import READABLE_FORMATS, PackedEntry, checked

        entry = checked(PackedEntry, config, "the quantization_config of the model")
        if entry.scheme is not None:
            raise ProxsparseError(
                f"the model is packed in {entry.scheme}, which the plug-in cannot serve yet: write "
                "it with proxsparse export, which vLLM serves as dense FP8, or pack it in 16 bits"
            )
        if entry.format_version not in READABLE_FORMATS:
            raise ProxsparseError(
                f"the model is packed in format {entry.format_version}, this proxsparse reads up "
                f"to {max(READABLE_FORMATS)}: install a newer one"
            )
        if entry.keep_dense or entry.memory == "fast":
            log.info("keep_dense is for transformers: in vLLM only the packed weights are held")
        return cls(PackedNames(entry.layers))

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: Mapping[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """Ours, where it was asked for and the checkpoint is dense whatever its config holds.

        Public 2:4 models are stored dense, with an entry of compressed-tensors that vLLM no longer
        understands.

        Raises:
            ProxsparseError: it was asked for, and the weights are quantised.
        """
        if user_quant != METHOD or hf_quant_cfg.get("quant_method") == METHOD:
            return None
        check_dense(hf_quant_cfg)
        return METHOD

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Take over the names that vLLM's model uses."""
        if self.names is not None:
            self.names.rename(hf_to_vllm_mapper.apply_list(list(self.names)))

    def get_quant_method(self, layer: nn.Module, prefix: str) -> Any:
        """How a layer is stored and run; None where it is not for us to say.

        Raises:
            ProxsparseError: it is packed but no linear layer, or cannot run here.
        """
        from vllm.model_executor.layers.linear import LinearBase

        if not isinstance(layer, LinearBase):
            self._look_at(layer, prefix)
            return None
        from vllm.config import get_current_vllm_config
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        from proxsparse.vllm.linear import PackedLinearMethod, PackingLinearMethod

        ranks = get_current_vllm_config().parallel_config
        self._has_all_layers = ranks.pipeline_parallel_size == 1
        if self.names is None:
            _check_platform(layer.params_dtype)
            self._num_unfinished += 1
            return PackingLinearMethod(self, prefix)
        own = prefix.rpartition(".")[2]
        is_packed = self.names.packed_parts(prefix, self.packed_modules_mapping.get(own, [own]))
        if not any(is_packed):
            self.summary.add_dense(prefix, "not packed")
            return UnquantizedLinearMethod()
        _check_platform(layer.params_dtype)
        self._num_unfinished += 1
        return PackedLinearMethod(self, prefix, is_packed)

    def _look_at(self, layer: nn.Module, prefix: str) -> None:
        """Refuse what is packed and no linear layer, and note what stays dense."""
        kinds = {kind.__name__ for kind in type(layer).__mro__}
        is_experts = bool(kinds & _EXPERTS)
        packed = [] if self.names is None else self.names.inside(prefix)
        if packed:
            what = f"a {type(layer).__name__}, and only linear layers run packed"
            if is_experts:
                what = "an expert, and vLLM runs those in one kernel that has no sparse form"
            pattern = "*experts*" if is_experts else prefix.rpartition(".")[2]
            raise ProxsparseError(
                f"{packed[0]} is packed, but in vLLM it is {what}. Prune again with --ignore "
                f"'{pattern}' and pack that, or serve the dense model: {_DENSE_INSTEAD}"
            )
        if is_experts:
            self.summary.add_dense(prefix, "experts, which have no sparse kernel")
        # The head is made last. Without a look here vLLM would stop at the first tensor it has no
        # place for, with nothing but its name.
        elif "ParallelLMHead" in kinds and self.names is not None and not self.names.is_any_taken:
            self.check_names()

    def check_names(self) -> None:
        """Refuse packed names without a layer, once all layers are made.

        A rank that holds some of the layers only cannot tell.
        """
        if self.names is not None and self._has_all_layers:
            check_all_taken(self.names)

    def finish(self, layout: str) -> None:
        """Count a layer that is ready; with the last one, say what became of them all.

        Args:
            layout: what of the layer decides the compiled graph.

        Raises:
            ProxsparseError: a dense model was to be packed, and nothing of it is 2:4.
        """
        self._num_unfinished -= 1
        self._layouts.append(layout)
        if self._num_unfinished:
            return
        self.check_names()
        if not self.summary.num_sparse and self._has_all_layers:
            raise ProxsparseError(
                "no linear layer of the model is 2:4, so there is nothing that --quantization "
                "proxsparse could run sparse: prune the model first (`proxsparse prune`), or "
                "leave the option out"
            )
        if self.names is None:
            _tell_apart_when_compiled(self._layouts)
        from vllm.distributed import get_tensor_model_parallel_rank

        if get_tensor_model_parallel_rank() == 0:
            log.info("proxsparse: %s", self.summary)


def check_dense(entry: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose weights are not stored as they are computed with.

    Args:
        entry: the `quantization_config` of its config.json.

    Raises:
        ProxsparseError: it is of another method than compressed-tensors, or its weights are
            quantised or compressed.
    """
    method, formats = entry.get("quant_method"), [entry.get("format")]
    sparsity = entry.get("sparsity_config") or {}
    formats.append(sparsity.get("format"))
    stored = [text for text in formats if text not in (None, "", "dense")]
    if method == "compressed-tensors" and not entry.get("config_groups") and not stored:
        return
    how = f"{method}" + (f" ({', '.join(map(str, stored))})" if stored else "")
    raise ProxsparseError(
        f"the weights of the model are stored as {how}: --quantization proxsparse packs 2:4 "
        "checkpoints whose weights are stored dense, in 16 or 32 bits. Leave the option out to "
        "serve the model as it is"
    )


def _check_platform(dtype: torch.dtype) -> None:
    """Refuse a device or a dtype that packed layers cannot run on.

    Raises:
        ProxsparseError: says which, and the way out.
    """
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return
    if not current_platform.is_cuda():
        raise ProxsparseError(
            f"packed layers run on NVIDIA's GPUs and on CPUs, not on {current_platform.device_name}"
            f": {_DENSE_INSTEAD}"
        )
    if not current_platform.has_device_capability(80):
        raise ProxsparseError(
            "packed layers need a GPU with sparse tensor cores, compute capability 8.0 or later, "
            f"and this one has {current_platform.get_device_capability()}: {_DENSE_INSTEAD}"
        )
    if dtype not in (torch.bfloat16, torch.float16):
        raise ProxsparseError(
            f"on a GPU packed layers run in bfloat16 or float16, and vLLM was started in {dtype}: "
            "start it with --dtype bfloat16"
        )
    from proxsparse import ops

    reason = ops.implementation("sparse_linear", "cuda")
    if isinstance(reason, str):
        raise ProxsparseError(
            f"the CUDA backend of proxsparse cannot be used here ({reason}): install proxsparse "
            f"where it finds a C++ compiler, see `proxsparse env`, or serve the dense model: "
            f"{_DENSE_INSTEAD}"
        )


def _tell_apart_when_compiled(layouts: list[str]) -> None:
    """Have vLLM's cache of compiled graphs know which layers are sparse.

    Its key holds the model's path and config. Neither says which layers of a dense checkpoint are
    2:4, and the directory may have been pruned anew since.
    """
    import hashlib

    from vllm.config import get_current_vllm_config

    more: Any = get_current_vllm_config().additional_config
    if isinstance(more, dict):
        more[METHOD] = hashlib.sha256("\n".join(layouts).encode()).hexdigest()


@functools.cache
def _warn_of_version() -> None:
    import vllm

    version = vllm.__version__
    try:
        major, minor = (int(number) for number in version.split(".")[:2])
    except ValueError:
        return
    if not KNOWN[0] <= (major, minor) <= KNOWN[1]:
        (a, b), (c, d) = KNOWN
        log.warning(
            "proxsparse's plug-in is made for vLLM %d.%d to %d.%d, and this is %s: if it "
            "fails, please report it",
            *(a, b, c, d, version),
        )
