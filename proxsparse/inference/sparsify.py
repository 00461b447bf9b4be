"""Making the pruned layers of a Hugging Face model sparse in memory, and dense again.

No model is known by name: the layers are those `find_targets` finds, and a layer is replaced
wherever the model holds it. What stays dense is reported with the reason.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from proxsparse import ops
from proxsparse.config import FP8_DYNAMIC, TargetConfig, check_scheme
from proxsparse.errors import ProxsparseError
from proxsparse.inference.replace import places_of, replace_, restore_layers_
from proxsparse.inference.sparse_linear import SparseLinear, check_keep_dense, sparse_layers
from proxsparse.models.offload import in_memory
from proxsparse.models.targets import Target, check_in_memory, find_targets

_REPORTED_TOKENS = (1, 16, 256, 4096)


@dataclasses.dataclass(frozen=True)
class SparseLayer:
    """A layer that is sparse now.

    Attributes:
        name: its dotted name.
        shape: (N, K).
        dense_bytes: of its dense weight.
        bytes: of every form of the weight that is kept, see `SparseLinear.memory_bytes`.
        speedups: token count -> speed-up over dense, of what was measured on this GPU (`advise`
            measures); empty elsewhere.
    """

    name: str
    shape: tuple[int, int]
    dense_bytes: int
    bytes: int
    speedups: dict[int, float]


@dataclasses.dataclass(frozen=True)
class SparsityReport:
    """What `sparsify_` left behind.

    Attributes:
        sparse: the layers that are sparse, in the order of the model.
        left_dense: name -> reason, for every other weight of two dimensions or more.
        keep_dense: whether the dense weights are held too.
    """

    sparse: tuple[SparseLayer, ...]
    left_dense: dict[str, str]
    keep_dense: bool

    @property
    def dense_bytes(self) -> int:
        """Bytes that the sparse layers' weights would take dense."""
        return sum(layer.dense_bytes for layer in self.sparse)

    @property
    def bytes(self) -> int:
        """Bytes that they take."""
        return sum(layer.bytes for layer in self.sparse)


def sparsify_(
    model: nn.Module,
    *,
    targets: tuple[str, ...] = (),
    ignore: tuple[str, ...] = (),
    keep_dense: bool = False,
    quantize: str | None = None,
    scales: Mapping[str, Tensor] | None = None,
) -> SparsityReport:
    """Replace the 2:4 layers of a model by `SparseLinear`, in place.

    Repeating it changes nothing but `keep_dense`; `densify_` undoes it bit by bit, unless weights
    were rounded. Afterwards `save_pretrained` writes a packed checkpoint. Hooks of accelerate move
    to the new layers; a layer that accelerate offloads is offloaded packed.

    Args:
        model: a Hugging Face causal LM, dense or partly sparse.
        targets: patterns as for pruning, see `find_targets`. Layers they match must be 2:4; without
            any, every prunable layer is looked at and those that are not 2:4 are left dense.
        ignore: patterns of layers to leave as they are.
        keep_dense: whether to hold the dense weights too, see `sparse_linear`; also changes what
            layers hold that are sparse already.
        quantize: "FP8_DYNAMIC" to round the sparse layers to FP8, those included that are sparse
            already; None keeps what they hold.
        scales: name of a layer -> float32 [N], the scales to round it with, such as those of the
            checkpoint that it came from; by default each row's own.

    Returns:
        The layers that are sparse, and why the others are not.

    Raises:
        ProxsparseError: not a causal LM; a pattern matches nothing; a layer that `targets` match
            cannot be sparse (the layer and, if it is not 2:4, the group are named); no layer is
            2:4; the model holds layers in FP8, and the others are not to be. The model is
            unchanged then.

    Cost: packs layer by layer; peak memory is the model's plus one layer's.
    """
    check_keep_dense(keep_dense)
    check_scheme(quantize, what="quantize")
    names, left_dense = _choose(model, TargetConfig(targets=targets, ignore=ignore), quantize)
    for name, layer in sparse_layers(model).items():
        if layer.scheme == quantize or quantize is None:
            layer.set_keep_dense_(keep_dense)
        else:
            names.append(name)
    places = places_of(model)
    for name in names:
        old: Any = model.get_submodule(name)
        with in_memory(old):
            new = SparseLinear.from_linear(
                old.to_linear() if isinstance(old, SparseLinear) else old,
                keep_dense=keep_dense,
                name=name,
                quantize=quantize,
                weight_scale=None if scales is None else scales.get(name),
            )
        replace_(places, old, new)
        del old
    sparse = sparse_layers(model)
    from proxsparse.inference.quantizer import attach

    attach(model, list(sparse), keep_dense, next(iter(sparse.values())).scheme)
    rows = (_row(name, layer) for name, layer in sparse.items())
    return SparsityReport(tuple(rows), left_dense, keep_dense)


def densify_(model: nn.Module) -> tuple[str, ...]:
    """Turn every SparseLinear of a model back into the dense layer it was, in place.

    Returns:
        The names of the layers that were sparse; none when the model is dense already.

    Cost: one layer after the other; the bits are the original ones.
    """
    names = restore_layers_(model)
    if names:
        from proxsparse.inference.quantizer import detach

        detach(model)
    return names


def _choose(
    model: nn.Module, config: TargetConfig, quantize: str | None
) -> tuple[list[str], dict[str, str]]:
    """Names of the layers to replace, and name -> reason of what stays dense.

    It holds names only, so that no layer outlives its replacement.
    """
    with _as_dense(model) as sparse:
        found = find_targets(model, config)
        names, left_dense = [], dict(found.left_dense)
        for target in found.layers:
            reason = ""
            if target.module not in sparse:
                reason = why_not_sparse(target) or _offence(target, quantize)
            if reason and config.targets:
                raise ProxsparseError(f"{target.name} cannot be sparse: it is {reason}")
            if reason:
                left_dense[target.name] = reason
            elif target.module not in sparse:
                names.append(target.name)
    already = sparse_layers(model)
    if not names and not already:
        first = next(t.name for t in found.layers)
        raise ProxsparseError(
            f"no layer of {type(model).__name__} can be sparse; {first} is {left_dense[first]}"
        )
    rounded = next((name for name, layer in already.items() if layer.scheme != quantize), None)
    if names and rounded is not None and quantize is None:
        raise ProxsparseError(
            f"{rounded} is in FP8 and {names[0]} is not to be: a packed model has one scheme; give "
            f"quantize={FP8_DYNAMIC!r}"
        )
    return names, {k: v for k, v in left_dense.items() if k not in already}


def why_not_sparse(target: Target) -> str:
    """Why a layer cannot be sparse whatever its weights, after "it is"; empty when it can."""
    from transformers.pytorch_utils import Conv1D

    module = target.module
    if len(target.shape) == 3:
        return "a tensor of experts [E, N, K], for which there is no packed layer"
    if target.sharers:
        return "a weight that several modules share, which packing each would multiply"
    patched = "forward" in vars(module) and not hasattr(module, "_hf_hook")
    if type(module) not in (nn.Linear, Conv1D) or patched:
        return f"a {type(module).__name__} with a forward pass of its own"
    return ""


def _offence(target: Target, quantize: str | None = None) -> str:
    """Why these weights cannot be packed, after "it is"; empty when they can."""
    with in_memory(target.module):
        check_in_memory((target,))
        w = target.weight()
        if not w.any():
            return "zero throughout, which no pruning makes: a packed weight could not be trained"
        if not ops.is_2to4(w):
            try:
                ops.pack_2to4(w)
            except ProxsparseError as error:
                return str(error).removeprefix("w is ")
        if quantize is not None and not torch.isfinite(w).all():
            return "damaged: some of its weights are NaN or infinite, which FP8 cannot hold"
    return ""


@contextlib.contextmanager
def _as_dense(model: Any) -> Iterator[dict[nn.Module, SparseLinear]]:
    """Show `find_targets` a partly sparse model as the dense one it stands for.

    Inside the block each SparseLinear is replaced by a dense layer without memory; yields those
    layers with what they stand for.
    """
    places, stand_ins = places_of(model), {}
    method = vars(model).pop("quantization_method", None) if sparse_layers(model) else None
    for layer in sparse_layers(model).values():
        shape = layer.out_features, layer.in_features
        empty = layer.linear_of(torch.empty(shape, dtype=layer.dtype, device="meta"))
        stand_ins[empty] = layer
        for parent, name in places[id(layer)]:
            parent._modules[name] = empty
    try:
        yield stand_ins
    finally:
        for layer in stand_ins.values():
            for parent, name in places[id(layer)]:
                parent._modules[name] = layer
        if method is not None:
            model.quantization_method = method


def _row(name: str, layer: SparseLinear) -> SparseLayer:
    shape = (layer.out_features, layer.in_features)
    size = torch.Size(shape).numel() * layer.dtype.itemsize
    return SparseLayer(name, shape, size, sum(layer.memory_bytes().values()), _speedups(layer))


def _speedups(layer: SparseLinear) -> dict[int, float]:
    """What is known of a layer's speed, by token count."""
    n, k, dtype = layer.out_features, layer.in_features, layer.values.dtype
    if not layer.values.is_cuda or ops.can_compress(n, k, dtype):
        return {}
    forms = {"unpack", "decode", "prefill"}
    forms |= {"dense"} if layer.dense is not None else set()
    forms |= {"cusparselt"} if layer.compressed is not None else set()
    device, has_bias = layer.values.get_device(), layer.bias is not None
    return ops.known_speedups(device, n, k, dtype, has_bias, _REPORTED_TOKENS, forms)
