"""A linear layer that keeps its 2:4 weight packed: two of every four weights, and where they stood.

It replaces an `nn.Linear` (or transformers' `Conv1D`) without changing what the model computes, and
turns back into it bit by bit. The packed form is all that is saved: 0.5625 of the bytes of a dense
weight in 16 bits. With `keep_dense` the dense weight is held too, so that no number of tokens need
be slower than the dense layer: 1.5625 of the dense bytes.

On a GPU the packed form is laid out as its kernels read it. On Hopper that is what cuSPARSELt reads
as well, so one copy serves few tokens and many. On other GPUs, and where out_features are not a
multiple of 64, cuSPARSELt needs a form of its own, which is held only beside the dense weight:
about 2.13 of the dense bytes then.

With values in FP8 the layer also has a scale for each row, rounds each token of its input to FP8
when it runs (scheme FP8_DYNAMIC), and holds 0.3125 of the bytes of a dense weight in 16 bits; with
`keep_dense`, 0.8125. Its dense weight is then the rounded one.

The packed weight is frozen: gradients reach the input and the bias. To go on training, turn the
model dense and hold its masks, see `masks.keep_masks_`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from proxsparse import ops
from proxsparse.config import FP8_DYNAMIC, check_scheme
from proxsparse.errors import ProxsparseError
from proxsparse.models.masks import check_codes
from proxsparse.ops.reference import FP8, dequantize_fp8

FORMS = ("values", "codes")  # the tensors of the packed form
FP8_FORMS = (*FORMS, "weight_scale")
_MAX_RUNS = 256  # shapes of inputs that a layer remembers how to run
# Asked here, because torch.compile cannot ask before torch 2.13.
_AUTOCAST = frozenset(
    kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)
)


class SparseLinear(nn.Module):
    """The linear layer x @ W^T + bias of a packed 2:4 weight W [N, K].

    Inputs may have any leading dimensions, none included; under autocast they and the weight are
    cast as those of `nn.Linear` are.

    Args:
        values: [N, K/2] kept weights, from `ops.pack_2to4`.
        codes: uint8 [N, ceil(K/8)] their places, from `ops.pack_2to4`.
        bias: [N], or None.
        weight_scale: float32 [N], the scale of each row, where values are float8_e4m3fn; else None.
        dtype: of the dense layer, where values are float8_e4m3fn; by default that of the bias, or
            bfloat16.
        keep_dense: whether to hold the dense weight too, see the module.
        is_conv1d: whether `to_linear` gives a Conv1D, which stores its weight as [K, N].

    Attributes:
        in_features: K.
        out_features: N.
        bias: the bias as a parameter, or None.
        values: as above, a persistent buffer.
        codes: as above, a persistent buffer; on a GPU in tiles, but not in the state dict (see
            `ops.lay_out_2to4`).
        weight_scale: as above, a persistent buffer, or None.
        dense: [N, K], the values unpacked, or None.
        compressed: the weight in the form of cuSPARSELt, or None; on Hopper the memory of values
            and codes itself.

    Raises:
        ProxsparseError: `keep_dense` is not a bool, or the tensors are not a packed weight.
    """

    bias: nn.Parameter | None
    values: Tensor
    codes: Tensor
    weight_scale: Tensor | None

    def __init__(
        self,
        values: Tensor,
        codes: Tensor,
        bias: Tensor | None = None,
        *,
        weight_scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
        keep_dense: bool = False,
        is_conv1d: bool = False,
    ) -> None:
        super().__init__()
        ops.check_packed_2to4(values, codes)
        if (weight_scale is not None) != (values.dtype == FP8):
            raise ProxsparseError(
                f"values are {values.dtype} and weight_scale is "
                f"{'None' if weight_scale is None else 'given'}: values of {FP8} have a scale for "
                "each row, others have none"
            )
        if dtype is None:
            dtype = torch.bfloat16 if bias is None else bias.dtype
        self._fp8_dtype = dtype
        self.out_features, half = values.shape
        self.in_features = 2 * half
        self.is_conv1d = is_conv1d
        self.label = "the layer"  # what an error calls it where no name reaches it
        self.register_buffer("values", values)
        self.register_buffer("codes", codes)
        if weight_scale is None:
            self.weight_scale = None
        else:
            self.register_buffer("weight_scale", weight_scale)
        # How calls run that nothing but the GPU has to see, by `ops.eager_key`.
        self._runs: dict[tuple[Any, ...], Callable[..., Tensor]] = {}
        # No buffers: libraries that place or offload a model's buffers do not expect absent ones.
        self.compressed: Tensor | None = None
        self.dense: Tensor | None = None
        if bias is not None and not isinstance(bias, nn.Parameter):
            bias = nn.Parameter(bias)
        self.register_parameter("bias", bias)
        self.check("a SparseLinear")
        self.set_keep_dense_(keep_dense)

    @classmethod
    @torch.no_grad()
    def from_linear(
        cls,
        linear: Any,
        *,
        keep_dense: bool = False,
        name: str = "",
        quantize: str | None = None,
        weight_scale: Tensor | None = None,
    ) -> SparseLinear:
        """Pack a layer whose weight is 2:4 already.

        Args:
            linear: an nn.Linear, or a Conv1D of transformers. Its bias is shared, not copied.
            keep_dense: whether to hold the dense weight too, see the module.
            name: what an error calls the layer.
            quantize: "FP8_DYNAMIC" to round the weight to FP8; None keeps its bits.
            weight_scale: float32 [N], the scales to round with; by default each row's own.

        Returns:
            The layer on the same device, in the same dtype.

        Raises:
            ProxsparseError: the weight is not 2:4 (the first offending group is named), or its
                in_features are not a multiple of 4; another scheme; NaN or infinite weights.
        """
        check_scheme(quantize, what="quantize")
        w, is_conv1d = _canonical_weight(linear)
        settings: dict[str, Any] = {"keep_dense": keep_dense, "is_conv1d": is_conv1d}
        try:
            if quantize == FP8_DYNAMIC:
                settings["dtype"] = w.dtype
                scale = None if weight_scale is None else weight_scale.to(w.device)
                w, settings["weight_scale"] = ops.quantize_fp8(w, scale)
            values, codes = ops.pack_2to4(w)
        except ProxsparseError as error:
            subject = name or f"the weight of {linear}"
            raise ProxsparseError(f"{subject} {str(error).removeprefix('w ')}") from error
        return cls(values, codes, linear.bias, **settings).train(linear.training)

    @classmethod
    def empty_like(
        cls, linear: Any, *, keep_dense: bool = False, quantize: str | None = None
    ) -> SparseLinear:
        """A layer of the shape, dtype and device of `linear`, to load a state dict into.

        Its values are uninitialised memory; in FP8, where that may hold NaN, zeros.
        """
        check_scheme(quantize, what="quantize")
        w, is_conv1d = _canonical_weight(linear)
        n, k = w.shape
        settings: dict[str, Any] = {"keep_dense": keep_dense, "is_conv1d": is_conv1d}
        if quantize == FP8_DYNAMIC:
            values = w.new_zeros(n, k // 2, dtype=FP8)
            settings |= {"weight_scale": w.new_ones(n, dtype=torch.float32), "dtype": w.dtype}
        else:
            values = w.new_empty(n, k // 2)
        codes = w.new_full((n, (k + 7) // 8), 0x44, dtype=torch.uint8)  # sound: places 0 and 1
        return cls(values, codes, linear.bias, **settings).train(linear.training)

    @torch.no_grad()
    def to_linear(self) -> nn.Module:
        """The dense layer again, sharing the bias.

        Kept weights are bitwise the original ones, or as FP8 has rounded them; all others exact
        +0.0.
        """
        return self.linear_of(self._widened(ops.unpack_2to4(self.values, self.codes)))

    def linear_of(self, w: Tensor) -> nn.Module:
        """A dense layer of this one's kind and bias, with another weight [N, K]."""
        linear: Any
        if self.is_conv1d:
            from transformers.pytorch_utils import Conv1D

            with torch.device("meta"):
                linear = Conv1D(self.out_features, self.in_features)  # type: ignore[no-untyped-call]
            w = w.T.contiguous()
        else:
            linear = nn.Linear(self.in_features, self.out_features, device="meta")
        linear.weight = nn.Parameter(w)
        linear.bias = self.bias
        result: nn.Module = linear.train(self.training)
        return result

    def set_keep_dense_(self, keep_dense: bool) -> None:
        """Hold the dense weight beside the packed one, or free it.

        Raises:
            ProxsparseError: not a bool.
        """
        check_keep_dense(keep_dense)
        self.keep_dense = keep_dense
        self.refresh_()

    @torch.no_grad()
    def refresh_(self) -> None:
        """Rebuild the other forms of the weight, after `values` or `codes` were written to."""
        self._runs.clear()
        self.compressed = self.dense = None
        if self.values.is_meta or self.codes.is_meta:
            return
        codes = ops.code_rows(self.values, self.codes)
        self.values, self.codes, self.compressed = ops.lay_out_2to4(self.values, codes)
        if self.keep_dense:
            self.dense = ops.unpack_2to4(self.values, codes)
            if self.compressed is None:
                self.compressed = _compress(self.dense)

    @torch.no_grad()
    def check(self, name: str) -> None:
        """Refuse tensors that are no packed 2:4 weight; what has no data is checked by shape alone.

        Args:
            name: what an error calls the layer.

        Raises:
            ProxsparseError: dtypes, shapes or devices that do not fit together, or codes that do
                not keep two of four.
        """
        ops.check_packed_2to4(self.values, self.codes)
        if self.weight_scale is not None:
            ops.check_weight_scale(self.values, self.weight_scale)
            ops.check_fp8(f"{name}.values", self.values)
            _check_scale(self.weight_scale, name)
        if not self.codes.is_meta:
            codes = ops.code_rows(self.values, self.codes)
            check_codes(codes, self.in_features // 4, name)

    def memory_bytes(self) -> dict[str, int]:
        """Bytes of each form of the weight that is kept: "packed", "compressed" and "dense".

        A compressed form that is the memory of the packed one counts as nothing.
        """
        is_shared = (
            self.compressed is not None and self.compressed.data_ptr() == self.values.data_ptr()
        )
        forms = {
            "packed": (self.values, self.codes, self.weight_scale),
            "compressed": (None if is_shared else self.compressed,),
            "dense": (self.dense,),
        }
        return {
            form: sum(0 if x is None else x.numel() * x.element_size() for x in tensors)
            for form, tensors in forms.items()
        }

    @property
    def weight(self) -> Tensor:
        """The dense weight [N, K], for code that reads a layer's weight; not to be written to.

        Cost: unpacked at each access, unless `keep_dense` is set; in FP8 widened at each.
        """
        w = ops.unpack_2to4(self.values, self.codes) if self.dense is None else self.dense
        return self._widened(w)

    def _widened(self, w: Tensor) -> Tensor:
        scale = self.weight_scale
        return w if scale is None else dequantize_fp8(w, scale, self.dtype)

    @property
    def dtype(self) -> torch.dtype:
        """Of the dense weight: that of the values, but for FP8."""
        return self._fp8_dtype if self.values.dtype == FP8 else self.values.dtype

    @property
    def scheme(self) -> str | None:
        """How the weight is rounded: "FP8_DYNAMIC", or None where it keeps its bits."""
        return None if self.weight_scale is None else FP8_DYNAMIC

    @property
    def forms(self) -> tuple[str, ...]:
        """Names of the buffers of the packed form."""
        return FORMS if self.weight_scale is None else FP8_FORMS

    def forward(self, x: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            x: [..., K], in the dtype of the weight unless autocast is on; for a weight in FP8,
                of 16 or 32 bits.

        Returns:
            [..., N].

        Raises:
            ProxsparseError: another last dimension, dtype or device than the weight's.
        """
        bias = self._parameters["bias"]  # past nn.Module.__getattr__, which takes its time
        key = ops.eager_key(x, bias)
        run = None if key is None else self._runs.get(key)
        forms: Any = self._buffers
        if run is not None and forms["values"].get_device() == x.get_device():
            y: Tensor = run(x, forms["values"], forms["codes"], bias, self.compressed, self.dense)
            return y
        if self.weight_scale is not None:  # such a layer remembers no runs
            return self._forward_fp8(x)
        values, compressed, dense = self.values, self.compressed, self.dense
        kind = x.device.type
        if kind in _AUTOCAST and torch.is_autocast_enabled(kind):
            # Autocast does not see into the op, so its rule is applied here: all but float64.
            dtype = torch.get_autocast_dtype(kind)
            x, values, bias, dense = (_autocast(t, dtype) for t in (x, values, bias, dense))
            if values.dtype != self.values.dtype:
                compressed = None
        y = ops.sparse_linear(x, values, self.codes, bias, compressed=compressed, dense=dense)
        if key is not None:
            self._remember(key, x)
        return y

    def _forward_fp8(self, x: Tensor) -> Tensor:
        kind, bias = x.device.type, self.bias
        if kind in _AUTOCAST and torch.is_autocast_enabled(kind):
            x, bias = (_autocast(t, torch.get_autocast_dtype(kind)) for t in (x, bias))
        assert self.weight_scale is not None
        return ops.sparse_linear_fp8(
            x, self.values, self.codes, self.weight_scale, bias, dense=self.dense
        )

    def _remember(self, key: tuple[Any, ...], x: Tensor) -> None:
        """Next time a call like this one goes straight to what runs it."""
        forms = self.values, self.codes, self.bias, self.compressed, self.dense
        run = ops.settled_sparse_linear(x, *forms)
        if run is None:
            return
        if len(self._runs) >= _MAX_RUNS:
            self._runs.clear()
        self._runs[key] = run

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_runs": {}}  # they belong to this process

    def extra_repr(self) -> str:
        """What `print(model)` shows of the layer."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, keep_dense={self.keep_dense}"
            + ("" if self.scheme is None else f", scheme={self.scheme}")
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseLinear:
        """Behind .to(), .half(), .cuda() ...: only the packed form moves, the others follow it.

        Another dtype is that of the dense layer: values in FP8 and their scales keep theirs.
        """
        before = self.values
        if self.weight_scale is not None:
            self._apply_to_fp8(fn)
        else:
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        if self.values is not before:
            self.refresh_()
        return self

    def _apply_to_fp8(self, fn: Callable[[Tensor], Tensor]) -> None:
        assert self.weight_scale is not None
        scale = self.weight_scale
        like = torch.empty(0, dtype=self._fp8_dtype, device=self.values.device)
        # As integers, which casts leave alone.
        self.values, self.weight_scale = self.values.view(torch.uint8), scale.view(torch.int32)
        try:
            super()._apply(fn)  # type: ignore[no-untyped-call]
            self._fp8_dtype = fn(like).dtype
        finally:
            self.values = self.values.view(FP8)
            self.weight_scale = self.weight_scale.view(torch.float32)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "codes"] = ops.code_rows(self.values, self.codes)

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Takes any part of the packed form; what is not in `state_dict` stays as it is.

        Raises:
            ProxsparseError: unsound codes, or a dense weight; nothing of the layer is changed then.
        """
        values, codes, scale = (state_dict.get(prefix + form) for form in FP8_FORMS)
        name = prefix.removesuffix(".") or self.label
        weight = state_dict.get(prefix + "weight")
        if weight is not None and weight.numel():
            raise ProxsparseError(
                f"{name} is packed, the state dict has a dense weight {list(weight.shape)} for it: "
                "load it into the dense model (densify_), then make that sparse (sparsify_)"
            )
        self._check_loaded(values, codes, scale, name)
        if codes is not None:
            self.codes = torch.empty_like(ops.code_rows(self.values, self.codes))
        super()._load_from_state_dict(state_dict, prefix, *args)
        unexpected_keys = args[3]
        if weight is not None and prefix + "weight" in unexpected_keys:
            unexpected_keys.remove(prefix + "weight")  # the empty one that files have
        if values is not None or codes is not None:
            self.refresh_()

    def _check_loaded(
        self, values: Tensor | None, codes: Tensor | None, scale: Tensor | None, name: str
    ) -> None:
        if values is not None and not values.is_floating_point():
            raise ProxsparseError(f"the values of {name} are {values.dtype}, not floating-point")
        if values is not None and (values.dtype == FP8) != (self.values.dtype == FP8):
            raise ProxsparseError(
                f"the values of {name} are {values.dtype}, the layer's {self.values.dtype}: a "
                "layer in FP8 and one that is not take no weights from each other; load them into "
                "a model that was packed in the same way"
            )
        if values is not None and values.dtype == FP8:
            ops.check_fp8(f"{name}.values", values)
        if scale is not None:
            _check_scale(scale, name)
        if codes is None:
            return
        if codes.dtype != torch.uint8:
            raise ProxsparseError(f"the codes of {name} are {codes.dtype}: they must be uint8")
        if not codes.is_meta and codes.shape[-1:] == ((self.in_features + 7) // 8,):
            check_codes(codes, self.in_features // 4, name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in FP8_FORMS and "_runs" in self.__dict__:
            self._runs.clear()  # they were chosen for other tensors: the next call looks again
        super().__setattr__(name, value)


def _check_scale(scale: Tensor, name: str) -> None:
    if scale.is_meta or bool((torch.isfinite(scale) & (scale > 0)).all()):
        return
    raise ProxsparseError(
        f"{name}.weight_scale holds a scale that is zero, negative, NaN or infinite: its file is "
        "damaged; pack the model again"
    )


def check_keep_dense(keep_dense: object) -> None:
    """Refuse what is no bool: a word such as "fast" would count as true.

    Raises:
        ProxsparseError: neither True nor False.
    """
    if not isinstance(keep_dense, bool):
        raise ProxsparseError(f"keep_dense is {keep_dense!r}: it must be True or False")


def sparse_layers(model: nn.Module) -> dict[str, SparseLinear]:
    """Name -> layer, for every SparseLinear in the model, each once."""
    return {name: m for name, m in model.named_modules() if isinstance(m, SparseLinear)}


def _canonical_weight(linear: Any) -> tuple[Tensor, bool]:
    """The layer's weight as [N, K], detached, and whether it is a Conv1D, stored as [K, N]."""
    is_conv1d = not isinstance(linear, nn.Linear)
    w = linear.weight.detach()
    return (w.T if is_conv1d else w), is_conv1d


def _compress(w: Tensor) -> Tensor | None:
    """The form of the GPU's sparse library, or None where it has none for this weight."""
    if not w.is_cuda or ops.can_compress(w.shape[0], w.shape[1], w.dtype):
        return None
    return ops.compress_2to4(w)


def _autocast(x: Any, dtype: torch.dtype) -> Any:
    return x if x is None or x.dtype == torch.float64 else x.to(dtype)
