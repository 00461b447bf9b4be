"""A backend for torch.compile: Inductor, with products of one input launched together.

The projections of queries, keys and values multiply the same tokens, as do those of gate and up.
While a model decodes each is a matter of microseconds: a small one leaves most of a GPU idle, and
each launch a moment of it. Module by module nobody can see that; in a traced graph it is plain.

    torch.compile(model, backend="proxsparse")
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

import proxsparse.ops  # noqa: F401 - it registers them

_op = torch.ops.proxsparse
_PRODUCTS = (_op.sparse_linear, _op.sparse_linear.default)


def compile_grouped(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Any:
    """Compiles a traced graph as Inductor does, after `group_products_`.

    Where gradients are recorded the graph is left as it is.

    Args:
        module: from torch.compile; changed in place.
        inputs: examples of its inputs.
        mode: of torch.compile, such as "reduce-overhead".
        options: of torch.compile: Inductor's settings.

    Returns:
        What runs in the graph's place.
    """
    from torch._inductor import list_mode_options
    from torch._inductor.compile_fx import compile_fx

    if not torch.is_grad_enabled():
        group_products_(module.graph)
        module.recompile()
    settings = {**(list_mode_options(mode) if mode else {}), **(options or {})}
    return compile_fx(module, inputs, config_patches=settings)


def group_products_(graph: fx.Graph) -> int:
    """Replace calls of `sparse_linear` with the same x by one of `sparse_linear_group`, in place.

    Calls whose weights come into being after the first of them stay where they are.

    Returns:
        How many groups were made.
    """
    order = {node: place for place, node in enumerate(graph.nodes)}
    calls: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _PRODUCTS:
            calls.setdefault(node.args[0], []).append(node)
    num_groups = 0
    for x, (first, *others) in calls.items():
        early = [n for n in others if all(order[i] < order[first] for i in n.all_input_nodes)]
        if early:
            _group_(graph, x, [first, *early])
            num_groups += 1
    return num_groups


def _group_(graph: fx.Graph, x: fx.Node, calls: list[fx.Node]) -> None:
    operands = [list(operand) for operand in zip(*(call.args[1:] for call in calls), strict=True)]
    with graph.inserting_before(calls[0]):
        group = graph.call_function(_op.sparse_linear_group.default, (x, *operands))
        for index, call in enumerate(calls):
            result = graph.call_function(operator.getitem, (group, index))
            result.meta = dict(call.meta)
            call.replace_all_uses_with(result)
    for call in calls:
        graph.erase_node(call)
