"""What transformers has to know to save and load a packed model: its quantisation interface.

Packing loses nothing, but to transformers a model whose layers hold other tensors than its class
declares is a quantised one. `config.json` names the packed layers; on loading they are replaced
before any weight is read, so that no dense weight of them is ever made.

A transformers that does not know us skips the entry and builds dense layers. So that it stops then,
instead of filling them with random numbers, a saved layer also has an empty tensor `weight`: its
shape fits no dense layer.

This is the one module that needs transformers to be imported. It is imported when a model is made
sparse, or on first use of the stand-ins that `registration` leaves with transformers.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from proxsparse.config import check_scheme
from proxsparse.errors import ProxsparseError
from proxsparse.inference.sparse_linear import (
    SparseLinear,
    check_keep_dense,
    sparse_layers,
)
from proxsparse.models.forms import FP8_FORMAT, READABLE_FORMATS, PackedEntry, checked
from proxsparse.models.offload import in_memory
from proxsparse.models.targets import is_linear_layer

METHOD = "proxsparse"
FORMAT = 2


class PackedConfig(QuantizationConfigMixin):
    """The entry `quantization_config` of a packed model's config.json.

    Args:
        layers: dotted names of the modules that are packed.
        keep_dense: whether the layers hold the dense weights too, see `sparse_linear`.
        format_version: of the tensors that were read; what is written has `FORMAT`, or in FP8
            `FP8_FORMAT`.
        quant_method: always "proxsparse".
        memory: what directories written by earlier versions have in place of `keep_dense`: "min" or
            "fast".
        scheme: "FP8_DYNAMIC" where the layers hold values in FP8 with a scale for each row.

    Raises:
        ProxsparseError: another format version, or values that are not those above.
    """

    def __init__(
        self,
        layers: Sequence[str] = (),
        keep_dense: bool = False,
        format_version: int = FORMAT,
        quant_method: str = METHOD,
        memory: str | None = None,
        scheme: str | None = None,
    ) -> None:
        entry = {
            "layers": list(layers) if isinstance(layers, tuple) else layers,
            "format_version": format_version,
            "memory": memory,
            "scheme": scheme,
        }
        checked(PackedEntry, entry, "the quantization_config of the model")
        if format_version not in (*READABLE_FORMATS, FP8_FORMAT):
            raise ProxsparseError(
                f"the model is packed in format {format_version}, this proxsparse reads up to "
                f"{FP8_FORMAT}: install a newer one"
            )
        check_scheme(scheme, what="the scheme of the model")
        if (scheme is None) == (format_version == FP8_FORMAT):
            raise ProxsparseError(
                f"the model is packed in format {format_version} and its scheme is {scheme!r}: "
                f"format {FP8_FORMAT} is that of layers in FP8, and of no others; its config.json "
                "is damaged"
            )
        if memory is not None:
            if memory not in ("min", "fast"):
                raise ProxsparseError(f"memory is {memory!r}: it must be min or fast")
            keep_dense = memory == "fast"
        check_keep_dense(keep_dense)
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format_version = FORMAT if scheme is None else FP8_FORMAT
        self.keep_dense = keep_dense
        self.layers = list(layers)
        if scheme is not None:  # earlier versions wrote none
            self.scheme = scheme


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
            layer = SparseLinear.empty_like(
                linear, keep_dense=config.keep_dense, quantize=getattr(config, "scheme", None)
            )
            layer.label = name
            model.set_submodule(name, layer)
        # The empty weights are for others to stumble over, not for a warning about leftovers.
        ignored = model._keys_to_ignore_on_load_unexpected
        kind = list if ignored is None or isinstance(ignored, list) else type(ignored)
        names = "|".join(re.escape(name) for name in config.layers)
        model._keys_to_ignore_on_load_unexpected = kind(
            [*(ignored or ()), rf"(^|\.)({names})\.weight$"]
        )
        return model

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """Refuses a checkpoint without a form of a packed layer (transformers 4 asks)."""
        missing = set(missing_keys)
        for name, form in self._forms(model):
            if f"{name}.{form}" in missing:
                raise _lacking(name, form)
        return missing_keys

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        for name, form in self._forms(model):
            tensor = getattr(model.get_submodule(name), form)
            # transformers 5 marks what it has read; what was not in the file is whatever lay there.
            if _MARKS_WHAT_IT_READ and not (tensor.is_meta or hasattr(tensor, _MARK)):
                raise _lacking(name, form)
        for name in self.quantization_config.layers:
            layer = model.get_submodule(name)
            with in_memory(layer):
                layer.check(name)
            layer.refresh_()
        return model

    def _forms(self, model: Any) -> Iterator[tuple[str, str]]:
        for name in self.quantization_config.layers:
            for form in model.get_submodule(name).forms:
                yield name, form

    def get_state_dict_and_metadata(self, model: Any, *_: Any) -> tuple[dict[str, Tensor], Any]:
        """What `save_pretrained` writes: the state dict and the empty weights."""
        state = dict(model.state_dict())
        for name in sparse_layers(model):
            state[f"{name}.weight"] = empty_weight()
        return state, {}

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
    def is_qat_trainable(self) -> bool:
        """Transformers' Trainer may train the other parameters without adapters."""
        return True

    @property
    def is_compileable(self) -> bool:
        """The layers trace into one graph."""
        return True


AUTO_QUANTIZER_MAPPING[METHOD] = PackedQuantizer
AUTO_QUANTIZATION_CONFIG_MAPPING[METHOD] = PackedConfig

_MARKS_WHAT_IT_READ = not hasattr(HfQuantizer, "update_missing_keys")
_MARK = "_is_hf_initialized"


def empty_weight() -> Tensor:
    """The tensor `weight` of a packed layer in a file; its shape fits no dense layer."""
    return torch.empty(0, dtype=torch.uint8)


def _lacking(name: str, form: str) -> ProxsparseError:
    return ProxsparseError(
        f"the checkpoint lacks {name}.{form} of the packed layer {name}: it is incomplete, or its "
        "config.json belongs to another; pack the model again"
    )


def attach(model: Any, layers: Sequence[str], keep_dense: bool, scheme: str | None = None) -> None:
    """Make `save_pretrained` and `dequantize` work on a model whose `layers` became sparse."""
    version = FORMAT if scheme is None else FP8_FORMAT
    config = PackedConfig(layers, keep_dense, format_version=version, scheme=scheme)
    model.config.quantization_config = config
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
