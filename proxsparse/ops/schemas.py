"""The ops as torch.library knows them: name, schema, fake and gradient, each once.

Importing this file registers them. An op's implementation is looked up at each call, by
`dispatch.choose`, so that `use_backend` holds inside torch.compile too.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from proxsparse.ops.dispatch import choose
from proxsparse.ops.reference import FP8, dequantize_fp8

_STEP = "Tensor step, Tensor lr, Tensor lam, Tensor grad_scale"
_ADAM = "float beta1, float beta2, float eps"


class Op(NamedTuple):
    """What torch.library has to know of an op.

    Attributes:
        schema: arguments and results, without the name.
        fake: results of the right shape and dtype for operands without data.
    """

    schema: str
    fake: Callable[..., Any]


def _nothing(*_: Any) -> None:
    return None


def _like_pack(w: Tensor) -> tuple[Tensor, Tensor]:
    *lead, k = w.shape
    return w.new_empty(*lead, k // 2), w.new_empty(*lead, (k + 7) // 8, dtype=torch.uint8)


def _like_product(x: Tensor, values: Tensor, *_: Any) -> Tensor:
    return x.new_empty(*x.shape[:-1], values.shape[0])


def _like_quantized(w: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor]:
    return w.new_empty(w.shape, dtype=FP8), w.new_empty(w.shape[:-1], dtype=torch.float32)


OPS = {
    "prox_2to4": Op("(Tensor z, Tensor lam) -> Tensor", lambda z, lam: torch.empty_like(z)),
    "project_2to4": Op("(Tensor w, Tensor? score) -> Tensor", lambda w, score: torch.empty_like(w)),
    "mask_2to4": Op(
        "(Tensor score) -> Tensor", lambda score: torch.empty_like(score, dtype=torch.bool)
    ),
    "is_2to4": Op("(Tensor w) -> Tensor", lambda w: w.new_empty((), dtype=torch.bool)),
    "pack_2to4": Op("(Tensor w) -> (Tensor, Tensor)", _like_pack),
    "unpack_2to4": Op(
        "(Tensor values, Tensor codes) -> Tensor",
        lambda values, codes: values.new_empty(*values.shape[:-1], 2 * values.shape[-1]),
    ),
    "prox_adamw_": Op(
        f"(Tensor(a!) p, Tensor grad, Tensor(b!) m, Tensor(c!) v, {_STEP}, Tensor? w0, "
        f"float lam2, float reg_eps, {_ADAM}, float weight_decay) -> ()",
        _nothing,
    ),
    "gate_update_": Op(
        "(Tensor(a!) s, Tensor grad, Tensor w0, Tensor(b!) m, Tensor(c!) v, "
        f"Tensor act_norm, {_STEP}, {_ADAM}, Tensor(d!)? out, bool hard, Tensor(e!)? scales, "
        "int seed) -> ()",
        _nothing,
    ),
    "gate_project_": Op("(Tensor s, Tensor w0, Tensor act_norm, Tensor(a!) out) -> ()", _nothing),
    "sparse_linear": Op(
        "(Tensor x, Tensor values, Tensor codes, Tensor? bias, Tensor? compressed, "
        "Tensor? dense) -> Tensor",
        _like_product,
    ),
    "sparse_linear_decode": Op(
        "(Tensor x, Tensor values, Tensor codes, Tensor? bias) -> Tensor", _like_product
    ),
    "sparse_linear_group": Op(
        "(Tensor x, Tensor[] values, Tensor[] codes, Tensor?[] bias, "
        "Tensor?[] compressed, Tensor?[] dense) -> Tensor[]",
        lambda x, values, *_: [_like_product(x, w) for w in values],
    ),
    "quantize_fp8": Op("(Tensor w, Tensor? scale) -> (Tensor, Tensor)", _like_quantized),
    "sparse_linear_fp8": Op(
        "(Tensor x, Tensor values, Tensor codes, Tensor weight_scale, Tensor? bias, "
        "Tensor? dense) -> Tensor",
        _like_product,
    ),
    "compress_2to4": Op(  # only the library knows the size
        "(Tensor w) -> Tensor",
        lambda w: w.new_empty(torch.library.get_ctx().new_dynamic_size(), dtype=torch.uint8),
    ),
}


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, codes, bias, _, dense = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(values, codes, dense)


def _sparse_linear_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients with respect to x and bias; the packed weight is frozen."""
    from proxsparse.ops import unpack_2to4

    values, codes, dense = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = grad @ (unpack_2to4(values, codes) if dense is None else dense)
    if ctx.has_bias and ctx.needs_input_grad[3]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, grad_bias, None, None


def _save_fp8_for_backward(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _, values, codes, weight_scale, bias, dense = inputs
    ctx.has_bias = bias is not None
    ctx.save_for_backward(values, codes, weight_scale, dense)


def _sparse_linear_fp8_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """As if x had not been rounded (a straight-through estimate); the weight is frozen."""
    from proxsparse.ops import unpack_2to4

    values, codes, weight_scale, dense = ctx.saved_tensors
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        w = unpack_2to4(values, codes) if dense is None else dense
        grad_x = grad @ dequantize_fp8(w, weight_scale, grad.dtype)
    if ctx.has_bias and ctx.needs_input_grad[4]:
        grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0)
    return grad_x, None, None, None, grad_bias, None


_library = torch.library.Library("proxsparse", "DEF")  # type: ignore[no-untyped-call]


def _register(name: str, op: Op) -> None:
    def run(first: Tensor, *args: Any) -> Any:
        return choose(name, first)(first, *args)

    _library.define(name + op.schema)  # type: ignore[no-untyped-call]
    _library.impl(name, run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"proxsparse::{name}", op.fake, lib=_library)


for _name, _op in OPS.items():
    _register(_name, _op)
torch.library.register_autograd(
    "proxsparse::sparse_linear",
    _sparse_linear_backward,
    setup_context=_save_for_backward,
    lib=_library,
)
torch.library.register_autograd(
    "proxsparse::sparse_linear_fp8",
    _sparse_linear_fp8_backward,
    setup_context=_save_fp8_for_backward,
    lib=_library,
)
