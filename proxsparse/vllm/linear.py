"""How vLLM's linear layers hold and run a packed weight.

On disk `values` [N, K/2] and `codes` [N, K/8] are rows, so merging projections is concatenation and
splitting them over ranks is slicing: vLLM's own loaders do both. Once a layer is loaded, merged and
split, its weight is laid out for the kernels and becomes the one parameter `weight`, see `storage`.
The name is that of the parameter it replaces, by which vLLM knows what it has offloaded, and by
which a reload finds the place to copy to.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    UnquantizedLinearMethod,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import BasevLLMParameter, ModelWeightParameter
from vllm.model_executor.utils import replace_parameter

from proxsparse import ops
from proxsparse.errors import ProxsparseError
from proxsparse.models.masks import check_codes
from proxsparse.vllm.names import MULTIPLE, check_split, packed_sizes
from proxsparse.vllm.storage import Layout, store

if TYPE_CHECKING:
    from proxsparse.vllm.config import SparseConfig

_log = logging.getLogger("vllm.plugins.proxsparse")
_Loader = Callable[..., Any]


class _RowsParameter(ModelWeightParameter):  # type: ignore[misc]
    """Those rows of a merged layer that are stored one way, sparse or dense.

    Args:
        starts: first row of each part in the layer -> its first row here.
        label: what an error calls the layer.
        **settings: of a ModelWeightParameter.
    """

    def __init__(self, *, starts: dict[int, int], label: str, **settings: Any) -> None:
        super().__init__(**settings)
        self._starts, self._label = starts, label

    def load_merged_column_weight(self, loaded_weight: Tensor, **place: Any) -> None:
        super().load_merged_column_weight(loaded_weight, **self._own(place))

    def load_qkv_weight(self, loaded_weight: Tensor, **place: Any) -> None:
        super().load_qkv_weight(loaded_weight, **self._own(place))

    def _own(self, place: dict[str, Any]) -> dict[str, Any]:
        start = self._starts.get(place["shard_offset"])
        if start is None:
            raise ProxsparseError(
                f"the checkpoint has a tensor for part {place.get('shard_id')} of {self._label} "
                "that does not go with what config.json says of it: one of the two belongs to "
                "another model"
            )
        return {**place, "shard_offset": start}


class _SparseMethod(LinearMethodBase):  # type: ignore[misc]
    """One layer, sparse in part at least, once it is loaded.

    Args:
        config: of the model.
        name: of the layer.

    Attributes:
        layout: of its weight, see `storage`; None while there is none, or where all of it is dense.
    """

    def __init__(self, config: SparseConfig, name: str) -> None:
        self.config, self.name = config, name
        self.layout: Layout | None = None
        self._is_loaded = False

    def keep(self, layer: Any, storage: Tensor, layout: Layout, reason: str) -> None:
        """Make the storage the layer's weight, and decide what its calls will run on.

        Nothing is decided, probed or measured later: while a CUDA graph is captured it could not
        be.

        Args:
            layer: vLLM's.
            storage: from `store`.
            layout: from `store`.
            reason: why its dense parts are dense, if it has some.

        Raises:
            ProxsparseError: the layer was laid out otherwise when it was first loaded.
        """
        is_first = self.loaded_as(layout)
        replace_parameter(layer, "weight", storage)
        values, codes, compressed, _ = layout.views(storage)
        for bias in {id(bias): bias for bias in (None, layer.bias)}.values():
            ops.decide_sparse_linear(values, codes, bias, compressed=compressed)
        if storage.is_cuda:  # vLLM replays its graphs one after the other, on one stream
            ops.promise_serial_replay(storage.get_device())
        if is_first:
            size, rows = storage.element_size(), sum(layout.sizes)
            dense_bytes, stored = rows * layout.k * size, storage.numel() * size
            mixed = reason if layout.rows(False) else ""
            self.config.summary.add_sparse(self.name, dense_bytes, stored, mixed)
            self.config.finish(f"{self.name} {layout}")

    def loaded_as(self, layout: Layout | None) -> bool:
        """Note how the layer is laid out; True when it is loaded for the first time.

        Raises:
            ProxsparseError: it was laid out otherwise before, and compiled or captured so.
        """
        if self._is_loaded and layout != self.layout:
            raise ProxsparseError(
                f"the weights that {self.name} is to be reloaded with are not 2:4 where those "
                "before were, or the other way round: only weights with the same layers sparse can "
                "take their place. Start the server anew"
            )
        is_first, self._is_loaded, self.layout = not self._is_loaded, True, layout
        return is_first

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product x @ W^T + bias."""
        assert self.layout is not None
        return self.layout.product(layer.weight, x, bias)

    def dequantize_weight(self, layer: Any) -> Tensor:
        """The dense weight [N, K], which vLLM asks for to quantise it."""
        if self.layout is None:
            w: Tensor = layer.weight
            return w
        _log.warning(
            "%s is quantised while loading, which makes it dense: the memory and the time that its "
            "zeros save are lost",
            self.name,
        )
        return self.layout.weight(layer.weight)


@register_weight_loader_v2_supported_method
class PackedLinearMethod(_SparseMethod):
    """A layer that the checkpoint holds packed, wholly or in parts.

    Args:
        config: of the model.
        name: of the layer.
        is_packed: whether each of the projections it is merged from is packed.
    """

    def __init__(self, config: SparseConfig, name: str, is_packed: list[bool]) -> None:
        super().__init__(config, name)
        self.is_packed = is_packed

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Make the parameters that the checkpoint's tensors are read into."""
        k, sizes = input_size_per_partition, list(output_partition_sizes)
        check_split(self.name, input_size, input_size // k)
        self.is_packed = packed_sizes(self.name, self.is_packed, sizes)
        self.sizes = sizes
        loader = extra["weight_loader"]
        # First, because vLLM goes by it when it offloads: see the top of the file.
        layer.register_parameter("weight", self._dense(k, params_dtype, loader))
        values = self._rows(True, k // 2, params_dtype, self._checking(loader))
        codes = self._rows(True, (k + 7) // 8, torch.uint8, loader)
        codes.data.fill_(0x44)  # sound codes, for --load-format dummy leaves them as they are
        layer.register_parameter("values", values)
        layer.register_parameter("codes", codes)

    def _rows(self, is_packed: bool, columns: int, dtype: torch.dtype, loader: _Loader) -> Any:
        start = own = 0
        starts = {}
        for size, packed in zip(self.sizes, self.is_packed, strict=True):
            if packed == is_packed:
                starts[start] = own
                own += size
            start += size
        data = torch.empty(own, columns, dtype=dtype)
        settings = {"data": data, "input_dim": 1, "output_dim": 0, "weight_loader": loader}
        if own == start:
            return ModelWeightParameter(**settings)
        return _RowsParameter(starts=starts, label=self.name, **settings)

    def _dense(self, k: int, dtype: torch.dtype, loader: _Loader) -> Any:
        """The rows of dense parts; without them only what reads the empty weights of the others."""
        name, is_mixed = self.name, not all(self.is_packed)

        @functools.wraps(loader)
        def load(param: Any, loaded_weight: Tensor, *place: Any, **named: Any) -> Any:
            if not loaded_weight.numel():
                return None  # what a packed layer has for others to stumble over
            if not is_mixed:
                raise ProxsparseError(
                    f"the checkpoint has a dense weight for {name}, which config.json says is "
                    "packed: one of the two belongs to another model"
                )
            return loader(param, loaded_weight, *place, **named)

        if is_mixed:
            return self._rows(False, k, dtype, load)
        # Of a class without dimensions to split, so that no model's own loader splits it.
        return BasevLLMParameter(data=torch.empty(0, dtype=dtype), weight_loader=load)

    def _checking(self, loader: _Loader) -> _Loader:
        """The loader, which first looks whether all names have found a layer."""
        config = self.config

        @functools.wraps(loader)
        def load(param: Any, loaded_weight: Tensor, *place: Any, **named: Any) -> Any:
            config.check_names()
            return loader(param, loaded_weight, *place, **named)

        return load

    def process_weights_after_loading(self, layer: Any) -> None:
        """Lay the weight out for the kernels.

        Raises:
            ProxsparseError: the codes are damaged.
        """
        if "values" not in layer._parameters:
            return  # done already
        values, codes = layer.values.data, layer.codes.data
        check_codes(codes, values.shape[1] // 2, self.name)
        dense = None if all(self.is_packed) else layer.weight.data
        storage, layout = store(values, codes, dense, self.sizes, self.is_packed)
        del layer.values, layer.codes
        self.keep(layer, storage, layout, "parts not packed")


@register_weight_loader_v2_supported_method
class PackingLinearMethod(_SparseMethod):
    """A layer of a dense checkpoint, which is packed on loading where it is 2:4."""

    def __init__(self, config: SparseConfig, name: str) -> None:
        super().__init__(config, name)
        self.linear = UnquantizedLinearMethod()

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra: Any,
    ) -> None:
        """Make the dense weight."""
        self.sizes = list(output_partition_sizes)
        self.linear.create_weights(
            layer,
            input_size_per_partition,
            output_partition_sizes,
            input_size,
            output_size,
            params_dtype,
            **extra,
        )

    def process_weights_after_loading(self, layer: Any) -> None:
        """Pack the parts that are 2:4."""
        w = layer.weight.data
        if w.dim() != 2:
            return  # done already
        parts = w.split(self.sizes)
        if w.shape[1] % MULTIPLE:
            reason = f"in_features on a rank no multiple of {MULTIPLE}"
        else:
            reason = "not 2:4"
        is_sparse = [not w.shape[1] % MULTIPLE and _is_sparse(part) for part in parts]
        if any(is_sparse):
            sparse = _joined(parts, is_sparse, True)
            dense = None if all(is_sparse) else _joined(parts, is_sparse, False)
            storage, layout = store(*ops.pack_2to4(sparse), dense, self.sizes, is_sparse)
            return self.keep(layer, storage, layout, "parts not 2:4")
        is_first = self.loaded_as(None)
        self.linear.process_weights_after_loading(layer)
        if is_first:
            self.config.summary.add_dense(self.name, reason)
            self.config.finish(f"{self.name} dense")

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product x @ W^T + bias."""
        if self.layout is None:
            dense: Tensor = self.linear.apply(layer, x, bias)
            return dense
        return super().apply(layer, x, bias)


def _is_sparse(w: Tensor) -> bool:
    """Whether a weight is 2:4; zero throughout is what no pruning makes."""
    return bool(w.any()) and bool(ops.is_2to4(w))


def _joined(parts: Sequence[Tensor], is_sparse: list[bool], wanted: bool) -> Tensor:
    """The parts of one kind behind one another."""
    return torch.cat(
        [part for part, sparse in zip(parts, is_sparse, strict=True) if sparse == wanted]
    )
