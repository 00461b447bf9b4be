"""What transformers has to know to save and load a packed model: its quantisation interface.

Packing loses nothing, but to transformers a model whose layers hold other tensors than its class
declares is a quantised one. `config.json` names the packed layers; on loading they are replaced
before any weight is read, so that no dense weight of them is ever made.

This is the one module that needs transformers to be imported. It is imported when a model is made
sparse, and by what `registration` has put into transformers' lists, once a packed model is met.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

# The registry first: to import `base` before it is to hold the lock of a module that its package
# imports, and a second thread that loads the package would wait for this one, and this one for it.
import transformers.quantizers.auto  # noqa: F401
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from proxsparse import ops
from proxsparse.errors import ProxsparseError
from proxsparse.inference.registration import METHOD
from proxsparse.inference.sparse_linear import SparseLinear, check_memory
from proxsparse.models.forms import PackedEntry, checked
from proxsparse.models.masks import check_codes
from proxsparse.models.targets import is_linear_layer

FORMAT = 1


class PackedConfig(QuantizationConfigMixin):
    """The entry `quantization_config` of a packed model's config.json.

    Args:
        layers: dotted names of the modules that are packed.
        memory: "min" or "fast", see `sparse_linear`.
        format_version: of the tensors `values` and `codes`.
        quant_method: always "proxsparse".

    Raises:
        ProxsparseError: another format version, or an unknown `memory`.
    """

    def __init__(
        self,
        layers: Sequence[str] = (),
        memory: str = "min",
        format_version: int = FORMAT,
        quant_method: str = METHOD,
    ) -> None:
        entry = {"layers": layers, "memory": memory, "format_version": format_version}
        entry["layers"] = list(layers) if isinstance(layers, tuple) else layers
        checked(PackedEntry, entry, "the quantization_config of the model")
        if format_version != FORMAT:
            raise ProxsparseError(
                f"the model is packed in format {format_version}, this proxsparse reads {FORMAT}: "
                "install a newer one"
            )
        check_memory(memory)
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format_version = format_version
        self.memory = memory
        self.layers = list(layers)


class PackedQuantizer(HfQuantizer):
    """Puts SparseLinear layers into a model before its packed weights are read."""

    requires_calibration = True  # a dense checkpoint is not packed on loading: see `sparsify_`
    quantization_config: PackedConfig

    def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
        config = self.quantization_config
        for name in config.layers:
            try:
                linear = model.get_submodule(name)
            except AttributeError as error:
                raise ProxsparseError(
                    f"the packed layer {name} does not exist in {type(model).__name__}: {error}"
                ) from error
            if not is_linear_layer(linear):
                raise ProxsparseError(
                    f"the packed layer {name} is a {type(linear).__name__} in "
                    f"{type(model).__name__}, not a linear layer"
                )
            model.set_submodule(name, SparseLinear.empty_like(linear, config.memory))
        return model

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name in self.quantization_config.layers:
            layer = model.get_submodule(name)
            if not layer.codes.is_meta:  # offloaded: not in memory now
                codes = ops.code_rows(layer.values, layer.codes)
                check_codes(codes, layer.in_features // 4, name)
                layer.refresh_()
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        from proxsparse.inference.replace import restore_layers_

        restore_layers_(model)
        return model

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Packed models can be saved."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Gradients pass through packed layers; their weights are frozen."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The layers trace into one graph."""
        return True


def attach(model: Any, layers: Sequence[str], memory: str) -> None:
    """Make `save_pretrained` and `dequantize` work on a model whose `layers` became sparse."""
    model.config.quantization_config = PackedConfig(layers, memory)
    model.hf_quantizer = PackedQuantizer(model.config.quantization_config)
    model.quantization_method = METHOD
    model.is_quantized = True


def detach(model: Any) -> None:
    """Undo `attach`, or what loading a packed model has set."""
    for owner, name in (
        (model, "hf_quantizer"),
        (model, "quantization_method"),
        (model, "is_quantized"),
        (model.config, "quantization_config"),
        (model.config, "_is_quantized"),
        (model.config, "_pre_quantization_dtype"),  # transformers 4
    ):
        if name in vars(owner):
            delattr(owner, name)
