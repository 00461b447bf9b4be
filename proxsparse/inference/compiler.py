"""A backend for torch.compile: Inductor, with products of one input launched together.

The projections of queries, keys and values multiply the same tokens, as do those of gate and up.
While a model decodes, each takes microseconds: a small one leaves most of a GPU idle, and every
launch costs time of its own. No module sees that others share its input; a traced graph shows it.

    torch.compile(model, backend="proxsparse")
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor import list_mode_options
from torch._inductor.compile_fx import compile_fx
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files

import proxsparse.ops  # noqa: F401 - it registers them
from proxsparse.errors import ProxsparseError

_op = torch.ops.proxsparse
_PASS = "post_grad_custom_pre_pass"  # of Inductor: on graphs in which nothing is changed in place


def compile_grouped(
    module: fx.GraphModule,
    inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: dict[str, Any] | None = None,
) -> Any:
    """Compiles a traced graph as Inductor does, with `GroupProducts` among its passes.

    Where gradients are recorded it is left out.

    Args:
        module: from torch.compile.
        inputs: examples of its inputs.
        mode: of torch.compile, such as "reduce-overhead".
        options: of torch.compile: Inductor's settings.

    Returns:
        What runs in the graph's place.

    Raises:
        ProxsparseError: the options have a pass of their own where this one goes.
    """
    settings = {**(list_mode_options(mode) if mode else {}), **(options or {})}
    if not torch.is_grad_enabled():
        if _PASS in settings:
            raise ProxsparseError(
                f"options set {_PASS}, where this backend has a pass of its own: leave it out, or "
                "use backend='inductor'"
            )
        settings[_PASS] = GroupProducts()
    return compile_fx(module, inputs, config_patches=settings)


class GroupProducts(CustomGraphPass):
    """Replaces calls of `sparse_linear` with the same x by one of `sparse_linear_group`.

    Calls whose weights come into being after the first of them stay where they are.
    """

    def __call__(self, graph: fx.Graph) -> None:
        """Changes the graph, in which no operand may be changed in place."""
        order = {node: place for place, node in enumerate(graph.nodes)}
        calls: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.find_nodes(op="call_function", target=_op.sparse_linear.default):
            calls.setdefault(node.args[0], []).append(node)
        for x, (first, *others) in calls.items():
            early = [n for n in others if all(order[i] < order[first] for i in n.all_input_nodes)]
            if early:
                _group_(graph, x, [first, *early])

    def uuid(self) -> Any:
        """Tells this pass from others, and from its other versions, where graphs are cached."""
        return get_hash_for_files((__file__,))


def _group_(graph: fx.Graph, x: fx.Node, calls: list[fx.Node]) -> None:
    operands = [list(operand) for operand in zip(*(call.args[1:] for call in calls), strict=True)]
    with graph.inserting_before(calls[0]):
        group = graph.call_function(_op.sparse_linear_group.default, (x, *operands))
        group.meta["val"] = [call.meta["val"] for call in calls]
        for index, call in enumerate(calls):
            result = graph.call_function(operator.getitem, (group, index))
            result.meta = dict(call.meta)
            call.replace_all_uses_with(result)
    for call in calls:
        graph.erase_node(call)
