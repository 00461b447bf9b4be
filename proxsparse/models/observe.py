"""The inputs that each target sees, taken from the model's own forward.

No model code is replayed, which would break with every release of transformers. A linear layer is a
module, so a forward pre-hook sees its input. An expert tensor is not: the experts of a layer are
slices of one parameter, multiplied somewhere inside a forward. While that forward runs, a
`TorchFunctionMode` looks at each matrix product and recognises the parameter by its memory; the
storage offset tells the expert.

The trade-off: this needs the experts' plain loop (transformers' "eager" implementation, forced
while observing), and a weight that is used in a way this file does not recognise is an error, not
an empty statistic.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from proxsparse.errors import ProxsparseError
from proxsparse.models.targets import Target, is_linear_layer

Callback = Callable[[Target, int | None, Tensor], None]

_PRODUCTS = {
    torch.matmul,
    torch.mm,
    torch.bmm,
    Tensor.matmul,
    Tensor.mm,
    Tensor.bmm,
}


@contextlib.contextmanager
def observe_inputs(targets: Sequence[Target], callback: Callback) -> Iterator[None]:
    """Within the context, calls `callback(target, expert, x)` whenever a target meets an input.

    x is [M, K], detached, in the dtype and on the device of the forward: M tokens, or the M tokens
    routed to that expert. It shares memory with the model's activations, so the callback copies
    what it keeps. `expert` is the index along E of a [E, N, K] target and None for [N, K]. An
    expert without tokens causes no call. Experts that a model runs on every token, weighting the
    outputs afterwards, are reported with every token.

    However the context is left, the model has no hooks and its own settings afterwards.

    Raises:
        ProxsparseError: a target was not seen in use although the module that calls it ran, or it
            is used in another layout than `find_targets` derived.
    """
    observer = _Observer(targets, callback)
    with contextlib.ExitStack() as stack:
        for hook in observer.register_hooks():
            stack.callback(hook.remove)
        bare = [target for target in targets if not is_linear_layer(target.module)]
        for config in _expert_configs(bare):
            stack.callback(
                setattr, config, "_experts_implementation", config._experts_implementation
            )
            config._experts_implementation = "eager"
        if bare:
            stack.enter_context(observer)
        yield
    missed = observer.ran - observer.seen
    if missed:
        first = next(target.name for target in targets if target in missed)
        raise ProxsparseError(
            f"the forward ran, but no product with {first} could be observed ({len(missed)} such "
            "layers): the model does not use it, or uses it in a fused operation. Switch that "
            "operation off, or add the layer to ignore"
        )


class _Observer(TorchFunctionMode):
    """Hooks on the modules, and a function mode for weights that no module of their own applies."""

    def __init__(self, targets: Sequence[Target], callback: Callback) -> None:
        super().__init__()
        self.targets = targets
        self.callback = callback
        self.ran: set[Target] = set()
        self.seen: set[Target] = set()
        self.active: list[Target] = []  # bare parameters whose module's forward is running

    def register_hooks(self) -> Iterator[torch.utils.hooks.RemovableHandle]:
        """Hooks that follow the targets; each is yielded at once, so that none can leak."""
        for target in self.targets:
            yield target.parent.register_forward_pre_hook(self._note_ran(target))
            for module in (target.module, *target.sharers):
                if is_linear_layer(target.module):
                    hook = self._report_layer(target)
                    yield module.register_forward_pre_hook(hook, with_kwargs=True)
                else:
                    yield module.register_forward_pre_hook(self._activate(target))
                    yield module.register_forward_hook(self._deactivate(target), always_call=True)

    def _note_ran(self, target: Target) -> Callable[..., None]:
        return lambda *_: self.ran.add(target)

    def _report_layer(self, target: Target) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            self._report(target, None, x)

        return hook

    def _activate(self, target: Target) -> Callable[..., None]:
        return lambda *_: self.active.append(target)

    def _deactivate(self, target: Target) -> Callable[..., None]:
        return lambda *_: self.active.remove(target)

    def _report(self, target: Target, expert: int | None, x: Tensor) -> None:
        self.seen.add(target)
        x = x.detach().reshape(-1, x.shape[-1])
        if len(x):
            self.callback(target, expert, x)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Looks for a target among the operands of a matrix product, then runs it."""
        kwargs = kwargs or {}
        if self.active:
            is_linear = func is F.linear
            if is_linear or func in _PRODUCTS:
                names = ("input", "weight") if is_linear else ("input", "mat2", "other")
                operands = (*args, *(kwargs[name] for name in names if name in kwargs))[:2]
                self._look_at(*operands, is_linear=is_linear)
        return func(*args, **kwargs)

    def _look_at(self, left: Tensor, right: Tensor, *, is_linear: bool) -> None:
        """Reports the input if left @ right, or F.linear(left, right), has a target as a factor."""
        for target in self.active:
            if _same_memory(right, target.parameter):
                self._report_product(target, right if is_linear else right.mT, left)
            elif _same_memory(left, target.parameter):
                self._report_product(target, left, right.mT if right.dim() > 1 else right)

    def _report_product(self, target: Target, w: Tensor, x: Tensor) -> None:
        """Reports x [..., K], multiplied by a w [N, K] or [E, N, K] in the target's memory."""
        whole = target.weight()
        if (w.shape[-1], w.stride(-1)) != (whole.shape[-1], whole.stride(-1)):
            raise ProxsparseError(
                f"{target.name} was taken for {list(whole.shape)} with strides {whole.stride()}, "
                f"but is multiplied as {list(w.shape)} with strides {w.stride()}: its layout was "
                "misread; add it to ignore"
            )
        offset = int(w.storage_offset() - whole.storage_offset())
        expert, offset = divmod(offset, whole.stride(0)) if whole.dim() == 3 else (None, offset)
        if offset:
            return  # the weight is used in parts, and its first rows have reported this input
        if expert is None or w.dim() == 2:
            self._report(target, expert, x)
        else:
            per_expert = x.expand(*x.shape[:-3], len(w), *x.shape[-2:])
            for index, inputs in enumerate(per_expert.unbind(-3)):
                self._report(target, expert + index, inputs)


def _same_memory(x: Tensor, parameter: Tensor) -> bool:
    """Whether x is a view of the parameter, which may itself be a part of a larger storage."""
    if x.untyped_storage()._cdata != parameter.untyped_storage()._cdata:
        return False
    return 0 <= x.storage_offset() - parameter.storage_offset() < parameter.numel()


def _expert_configs(targets: Sequence[Target]) -> list[Any]:
    """The configs of the targets' modules that choose how experts are computed, each once."""
    configs = {id(c): c for t in targets if (c := getattr(t.module, "config", None)) is not None}
    return [c for c in configs.values() if hasattr(c, "_experts_implementation")]
