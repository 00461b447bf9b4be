"""Which weights of a Hugging Face causal LM are pruned, and why the others are not.

Nothing here knows a model by name. The decoder blocks are the `nn.ModuleList` that holds the most
linear weight; inside it every `nn.Linear`, every `Conv1D` (stored transposed) and every expert
tensor [E, N, K] is a target. Whatever is not pruned is listed with a reason, so that no weight is
missed in silence. The trade-off: a weight whose layout the code does not tell is left dense rather
than guessed.

Shapes: N out_features, K in_features, E experts. Groups of four run along K, the input dimension.
"""

from __future__ import annotations

import dataclasses
import re
from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from proxsparse.config import TargetConfig
from proxsparse.errors import ProxsparseError

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
    """One weight to prune, seen as [N, K] or, for the experts of a layer, [E, N, K].

    Attributes:
        name: what users call it and patterns match: the module's dotted name when the parameter is
            its `weight` ("model.layers.0.self_attn.q_proj"), else the parameter's own
            ("model.layers.0.mlp.experts.gate_up_proj").
        module: the module that owns the parameter.
        attribute: the parameter's name in `module`.
        parameter_name: its name in the model's state dict.
        block: index of its decoder block; the number of blocks for an lm_head targeted by name.
        transposed: stored as [K, N] or [E, K, N].
        parent: the module that calls `module`.
        sharers: further modules that hold the same parameter.
    """

    name: str
    module: nn.Module
    attribute: str
    parameter_name: str
    block: int
    transposed: bool
    parent: nn.Module
    sharers: tuple[nn.Module, ...] = ()

    @property
    def parameter(self) -> nn.Parameter:
        """The stored parameter, looked up anew because moving a model may replace it."""
        parameter: nn.Parameter = getattr(self.module, self.attribute)
        return parameter

    @property
    def shape(self) -> tuple[int, ...]:
        """(N, K) or (E, N, K), however it is stored."""
        *experts, a, b = self.parameter.shape
        return (*experts, b, a) if self.transposed else (*experts, a, b)

    def weight(self) -> Tensor:
        """The weight as a detached view [N, K] or [E, N, K]; writing to it changes the model."""
        return self.canonical(self.parameter.detach())

    def grad(self) -> Tensor | None:
        """The parameter's gradient as a view [N, K] or [E, N, K], if there is one."""
        grad = self.parameter.grad
        return None if grad is None else self.canonical(grad)

    def set_weight_(self, w: Tensor) -> None:
        """Copies w, [N, K] or [E, N, K] of the parameter's dtype, into the stored parameter.

        Raises:
            ProxsparseError: shape or dtype differ from the parameter's.
        """
        if tuple(w.shape) != self.shape or w.dtype != self.parameter.dtype:
            raise ProxsparseError(
                f"{self.name} is {list(self.shape)} of {self.parameter.dtype}: it cannot take a "
                f"weight {list(w.shape)} of {w.dtype}"
            )
        check_in_memory((self,))
        self.weight().copy_(w)

    def canonical(self, stored: Tensor) -> Tensor:
        """A tensor of the parameter's layout as a view [N, K] or [E, N, K].

        Of one that is split over processes, the rows of this one.
        """
        if isinstance(stored, DTensor):
            stored = stored.to_local()
        return stored.mT if self.transposed else stored


@dataclasses.dataclass(frozen=True)
class Targets:
    """What `find_targets` decided about each weight of at least two dimensions.

    Attributes:
        layers: the weights to prune, in the order of the model.
        left_dense: name -> reason, for every other one.
        blocks: the decoder blocks, in order.
        block_names: their dotted names.
    """

    layers: tuple[Target, ...]
    left_dense: dict[str, str]
    blocks: tuple[nn.Module, ...]
    block_names: tuple[str, ...]


def is_linear_layer(module: nn.Module) -> bool:
    """Whether the module applies its `weight` to its input: nn.Linear, or transformers' Conv1D."""
    from transformers.pytorch_utils import Conv1D

    return isinstance(module, (nn.Linear, Conv1D))


@dataclasses.dataclass(frozen=True)
class _Found:
    """A weight; `never` and `by_default` are reasons in the model's structure to leave it dense."""

    target: Target
    never: str = ""
    by_default: str = ""


def find_targets(
    model: nn.Module,
    config: TargetConfig | None = None,
    *,
    names: frozenset[str] | None = None,
) -> Targets:
    r"""The weights of `model` that are pruned under `config`. Reads shapes only, so meta will do.

    A pattern in `config.targets` or `config.ignore` is one of
    * a name, whole ("model.layers.0.mlp.up_proj") or its last parts ("mlp.up_proj", "up_proj");
    * the class name of the module that owns the weight ("Linear", "Conv1D", "MixtralExperts");
    * "re:" and a regular expression, matched from the start of the name as by `re.match`
      ("re:model\.layers\.[0-3]\.", "re:.*_proj").

    `ignore` beats `targets`. Without `targets`, all linear layers of the decoder blocks are taken.
    The lm_head and the routers of mixtures of experts are left dense unless `targets` has their
    name; a class name or a regular expression does not take them.

    Args:
        model: a causal LM.
        config: which weights to take.
        names: the parameter names of the weights to take, in place of `config`. They are compared
            as they are, so names from a file cannot be patterns.

    Raises:
        ProxsparseError: not a causal LM; quantised; no decoder blocks; a weight to prune has a
            dtype that cannot be pruned; a pattern is no valid regular expression, matches nothing,
            or matches only weights that are not pruned; nothing is left to prune.
    """
    config = TargetConfig() if config is None else config
    check_causal_lm(model)
    blocks = _find_blocks(model)
    found = _find_weights(model, blocks)
    if names is None:
        _check_patterns(found, config)
    else:
        _check_names(found, names, type(model).__name__)

    layers, left_dense = [], {}
    for item in found:
        if names is None:
            reason = _reason_to_leave(item, config)
        else:
            reason = "" if item.target.parameter_name in names else "not among the names"
        if reason:
            left_dense[item.target.name] = reason
        else:
            layers.append(item.target)
    if not layers:
        reasons = _summary_of_reasons(list(left_dense.items()))
        raise ProxsparseError(
            f"no weight of {type(model).__name__} is left to prune with targets {config.targets} "
            f"and ignore {config.ignore}: {reasons}"
        )
    for target in layers:
        if target.parameter.dtype not in DTYPES:
            raise ProxsparseError(
                f"{target.name} is stored as {target.parameter.dtype}, which cannot be pruned: "
                "load the model unquantised, in float32, bfloat16 or float16, or put the layer in "
                "ignore"
            )
    return Targets(tuple(layers), left_dense, tuple(blocks.values()), tuple(blocks))


def check_causal_lm(model: nn.Module) -> None:
    """Refuse what is no plain causal language model of transformers.

    Raises:
        ProxsparseError: adapted, wrapped, an encoder-decoder, packed or quantised.
    """
    kind, config = type(model).__name__, getattr(model, "config", None)
    adapted = next((n for n, m in model.named_modules() if _is_adapter(m)), None)
    if adapted is not None or getattr(model, "_hf_peft_config_loaded", False):
        raise ProxsparseError(
            f"{kind} carries an adapter ({adapted or 'of peft'}), whose own matrices are no layers "
            "to prune: merge the adapter first, with merge_and_unload(), or unload() it"
        )
    if hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
        raise ProxsparseError(
            f"{kind} is a wrapper, under which the layers have other names: pass the model in it, "
            "as accelerator.unwrap_model(model, keep_torch_compile=False) returns it"
        )
    can_generate = getattr(model, "can_generate", None)
    if config is None or can_generate is None or not can_generate():
        raise ProxsparseError(
            f"{kind} is not a causal language model of transformers: load the model with "
            "AutoModelForCausalLM.from_pretrained, and pass it without a wrapper"
        )
    if getattr(config, "is_encoder_decoder", False):
        raise ProxsparseError(
            f"{kind} is an encoder-decoder: only decoder-only models can be pruned"
        )
    # Some quantised layers keep their weight in buffers, where no look at parameters would find it.
    method = getattr(model, "quantization_method", None)
    if method == "proxsparse":
        raise ProxsparseError(
            f"{kind} is packed already: make it dense first, with densify_ in memory or proxsparse "
            "unpack on disk"
        )
    if method is not None:
        raise ProxsparseError(
            f"{kind} is quantised ({getattr(method, 'value', method)}): prune the unquantised "
            "model, then quantise the result"
        )


def _is_adapter(module: nn.Module) -> bool:
    """Whether peft made it: a model with adapters, or a layer of such a model."""
    return any(kind.__module__.partition(".")[0] == "peft" for kind in type(module).__mro__)


def check_in_memory(targets: Sequence[Target]) -> None:
    """Refuse weights that are not in memory, before a job reads nothing or writes into nothing.

    Raises:
        ProxsparseError: names the first one that is on the meta device.
    """
    for target in targets:
        if target.parameter.is_meta:
            raise ProxsparseError(
                f"{target.name} is not in memory (its weight is on meta): accelerate has offloaded "
                "it, or the model was never loaded. Load the model without offloading, with "
                "device_map='cpu' say"
            )


def _find_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> decoder block: the members of the module list with the most linear weight."""
    names = {module: name for name, module in model.named_modules()}
    decoder = getattr(model, "get_decoder", lambda: model)()
    # The decoder first: an image tower may be larger than it.
    for root in (decoder, model) if decoder in names else (model,):
        lists = [m for m in root.modules() if isinstance(m, nn.ModuleList)]
        # Of equals max takes the first: an outer list wins over the lists in it, of experts say.
        best = max(lists, key=_matrix_size, default=None)
        if best is not None and _matrix_size(best):
            return {f"{names[best]}.{i}": block for i, block in best.named_children()}
    raise ProxsparseError(
        f"{type(model).__name__} has no decoder blocks: no nn.ModuleList in it holds linear weight"
    )


def _matrix_size(module: nn.Module) -> int:
    """Number of weights in matrices, embeddings apart."""
    return sum(
        parameter.numel()
        for m in module.modules()
        for parameter in m.parameters(recurse=False)
        if parameter.dim() >= 2 and not isinstance(m, nn.Embedding)
    )


def _find_weights(model: nn.Module, blocks: dict[str, nn.Module]) -> list[_Found]:
    """Every parameter of two dimensions or more, once, in the order of the model."""
    modules = dict(model.named_modules())
    head = getattr(model, "get_output_embeddings", lambda: None)()
    embeddings = {
        _place(parameter): name
        for name, module in modules.items()
        if isinstance(module, nn.Embedding)
        for parameter in module.parameters(recurse=False)
    }
    block_index = {name: index for index, name in enumerate(blocks)}
    found: list[_Found] = []
    first_at: dict[tuple[int, int | torch.SymInt], int] = {}
    for owner, module in modules.items():
        block = next((i for b, i in block_index.items() if f"{owner}.".startswith(f"{b}.")), None)
        for attribute, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2:
                continue
            full_name = f"{owner}.{attribute}".lstrip(".")
            is_router = _is_router(modules, owner)
            layout = _is_transposed(model, module, attribute, is_router)
            target = Target(
                name=owner if attribute == "weight" and owner else full_name,
                module=module,
                attribute=attribute,
                parameter_name=full_name,
                block=len(blocks) if block is None else block,
                transposed=layout is True,
                parent=modules[owner.rpartition(".")[0]],
            )
            never = by_default = ""
            place = _place(parameter)
            if isinstance(module, nn.Embedding):
                never = "embedding"
            elif place in embeddings:
                never = f"tied to embeddings ({embeddings[place]})"
            elif place in first_at:
                first = found[first_at[place]]
                sharers = (*first.target.sharers, module)
                shared = dataclasses.replace(first.target, sharers=sharers)
                found[first_at[place]] = dataclasses.replace(first, target=shared)
                never = f"shares its weight with {shared.name}"
            elif isinstance(layout, str):
                never = layout
            elif block is None and module is not head:
                never = "outside the decoder blocks"
            elif target.shape[-1] % 4 and parameter.dtype in DTYPES:
                never = f"in_features {target.shape[-1]} is not a multiple of 4"
            elif block is None:
                by_default = "lm_head"
            elif is_router:
                by_default = "router"
            first_at.setdefault(place, len(found))
            found.append(_Found(target, never, by_default))
    return found


def _place(parameter: Tensor) -> tuple[int, int | torch.SymInt]:
    """Where a tensor lies; equal for parameters that share memory, on the meta device too."""
    return parameter.untyped_storage()._cdata, parameter.storage_offset()


def _is_router(modules: dict[str, nn.Module], owner: str) -> bool:
    """Whether a part of the name is a router, or a gate next to experts (not any gate_proj)."""
    path = owner.split(".")
    for depth, part in enumerate(path):
        if "router" in part:
            return True
        if part == "gate" or part.endswith("_gate"):
            siblings = modules[".".join(path[:depth])].named_children()
            if any("experts" in name for name, _ in siblings):
                return True
    return False


def _is_transposed(
    model: nn.Module, module: nn.Module, attribute: str, is_router: bool
) -> bool | str:
    """Whether the weight is stored [..., K, N], or the reason why it is no linear layer of ours."""
    kind = type(module).__name__
    if attribute == "weight" and is_linear_layer(module):
        return not isinstance(module, nn.Linear)
    num_dims = getattr(module, attribute).dim()
    is_router = is_router and num_dims == 2
    if "bias" in attribute:
        return "a bias"
    if isinstance(module, nn.modules.conv._ConvNd) or not (num_dims == 3 or is_router):
        return f"a parameter of {kind}, which is not a linear layer"

    declared = getattr(module, "is_transposed", None)  # set by transformers 5 on its experts
    if isinstance(declared, bool):
        return declared
    # One module stores all its experts one way, so a square tensor follows the others.
    votes = {
        _layout_from_widths(model, module, "router" if is_router else name, parameter)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() == num_dims
    } - {None}
    vote = votes.pop() if len(votes) == 1 else None
    if vote is None:
        return f"the code of {kind} does not tell whether it is stored [N, K] or [K, N]"
    return vote


def _layout_from_widths(
    model: nn.Module, module: nn.Module, name: str, parameter: Tensor
) -> bool | None:
    """Whether [..., a, b] is [..., K, N], told by the width of the layer's input or output.

    The widths are those the module declares; failing that, gate and up projections read, and down
    projections write, the model's hidden size. None when that does not decide.
    """
    rows, columns = parameter.shape[-2:]
    if rows == columns:
        return None
    for pair in (("in_features", "out_features"), ("input_size", "output_size")):
        widths = tuple(getattr(module, width, None) for width in pair)
        if set(widths) == {rows, columns}:
            return widths == (rows, columns)
    config = getattr(model, "config", None)
    hidden = getattr(getattr(config, "get_text_config", lambda: config)(), "hidden_size", None)
    if hidden not in (rows, columns):
        return None
    parts = set(name.split("_"))
    if "down" in parts:
        return bool(columns == hidden)
    if parts & {"gate", "up", "router"}:
        return bool(rows == hidden)
    return None


def _matches(pattern: str, target: Target) -> bool:
    if pattern.startswith("re:"):
        return re.match(pattern[3:], target.name) is not None
    return _is_name_of(pattern, target) or pattern == type(target.module).__name__


def _is_name_of(pattern: str, target: Target) -> bool:
    return f".{target.name}".endswith(f".{pattern}")


def _reason_to_leave(item: _Found, config: TargetConfig) -> str:
    """Why a weight is left dense; empty when it is pruned."""
    if item.never:
        return item.never
    for pattern in config.ignore:
        if _matches(pattern, item.target):
            return f"ignored by pattern {pattern!r}"
    if item.by_default:
        named = any(_is_name_of(pattern, item.target) for pattern in config.targets)
        return "" if named else item.by_default
    if config.targets and not any(_matches(pattern, item.target) for pattern in config.targets):
        return "not matched by targets"
    return ""


def _check_names(found: Sequence[_Found], names: frozenset[str], kind: str) -> None:
    reasons = {item.target.parameter_name: item.never for item in found}
    for name in sorted(names):
        reason = reasons.get(name, "it has no such weight")
        if reason:
            raise ProxsparseError(f"{kind} has no weight {name!r} that can be pruned: {reason}")


def _check_patterns(found: Sequence[_Found], config: TargetConfig) -> None:
    for field, patterns in (("targets", config.targets), ("ignore", config.ignore)):
        for pattern in patterns:
            if pattern.startswith("re:"):
                try:
                    re.compile(pattern[3:])
                except re.error as error:
                    raise ProxsparseError(
                        f"{field} pattern {pattern!r} is not a valid regular expression: {error}"
                    ) from None
            matched = [item for item in found if _matches(pattern, item.target)]
            if not matched:
                classes = sorted({type(item.target.module).__name__ for item in found})
                raise ProxsparseError(
                    f"{field} pattern {pattern!r} matches no weight. Names end in: "
                    f"{_summary([item.target.name for item in found])}; classes are: "
                    f"{', '.join(classes)}. For a regular expression, write 're:...'"
                )
            if field == "targets":
                alone = TargetConfig(targets=(pattern,))
                reasons = [(item.target.name, _reason_to_leave(item, alone)) for item in matched]
                if all(reason for _, reason in reasons):
                    raise ProxsparseError(
                        f"targets pattern {pattern!r} matches only weights that are not pruned: "
                        f"{_summary_of_reasons(reasons)}"
                    )


def _summary(names: Sequence[str]) -> str:
    """Names counted by their last part: "q_proj (32), k_proj (32), lm_head"."""
    counts = Counter(name.rpartition(".")[2] for name in names)
    return ", ".join(name if n == 1 else f"{name} ({n})" for name, n in counts.items())


def _summary_of_reasons(reasons: Sequence[tuple[str, str]]) -> str:
    """Reasons with the names they hold for: "q_proj (32): ignored by pattern 'Linear'"."""
    names: dict[str, list[str]] = {}
    for name, reason in reasons:
        names.setdefault(reason, []).append(name)
    return "; ".join(f"{_summary(group)}: {reason}" for reason, group in names.items())
