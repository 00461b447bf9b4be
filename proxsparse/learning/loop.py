"""The optimiser loop of the learned methods.

A method is a `Rule` that says what state a layer has, how one step changes it, and which weights it
would keep. The loop owns everything else: data order, schedule, gradients, checkpoints, metrics,
interruption. It is no general trainer: a trainer steps after the backward pass, and a layer here is
updated inside it, as soon as its gradient is there.

A run is a function of (model, tokens, settings): the batch of a step depends on the seed and the
step alone, so a resumed run sees what an undisturbed one would have seen.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

import torch
from torch import Tensor, nn

from proxsparse import ops
from proxsparse.errors import Interrupted, ProxsparseError
from proxsparse.learning import distributed
from proxsparse.learning.batch_order import BatchOrder
from proxsparse.learning.job import Job
from proxsparse.learning.loss import (
    Dense,
    Loss,
    can_chunk,
    chunked_divergence_loss,
    chunked_next_token_loss,
    divergence_loss,
    next_token_loss,
)
from proxsparse.learning.memory import memory_gb
from proxsparse.learning.rule import Rule, State, StepScalars
from proxsparse.learning.step_graph import Step, as_graph
from proxsparse.learning.streaming import consuming_gradients, recomputing, weights_on_demand
from proxsparse.models.files import explaining_full_disk, write_text_whole
from proxsparse.models.masks import Masks
from proxsparse.models.precision import eval_mode
from proxsparse.models.targets import Target, Targets
from proxsparse.progress import Progress

_METRICS_EVERY = 10  # steps between looks at the loss: each look makes a GPU wait for the host
_COUNTED_AT_ONCE = 2**24  # weights whose masks are compared together: few kernels, little memory
_WARMUP = 0.1  # share of the steps
_DIVERGED_BY = 1.0  # nats above the loss of the first steps, from which no schedule comes back


def learn(job: Job, rule: Rule) -> Masks:
    """Run `rule` for job.learn.steps steps; returns the masks and leaves the weights as they were.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written if there is a place for one.
        ProxsparseError: the loss became NaN or infinite.
    """
    layers = job.targets.layers
    distributed.reshard(job.model)
    w0 = {t.name: t.weight() for t in layers}
    if not rule.on_demand:
        w0 = {name: w.clone(memory_format=torch.contiguous_format) for name, w in w0.items()}
    states = {t.name: rule.start(t, w0[t.name]) for t in layers}
    rows = {f"{t.name}/{key}": t.shape[0] for t in layers for key in states[t.name]}
    done = _restore(job, states, rows)
    if job.checkpoints is not None and job.learn.checkpoint_every:
        left = (job.learn.steps - 1) // job.learn.checkpoint_every
        job.checkpoints.check_room(_flatten(states), left - done // job.learn.checkpoint_every)
    run = _Run(job, rule, w0, states)
    try:
        with (
            eval_mode(job.model),
            _only_targets_require_grad(job.model, job.targets),
            run.current_weights(),
            _stop_requests() as stop,
        ):
            _loop(run, done, stop)
        masks = Masks()
        for t in layers:
            weight = run.weight(t)
            mask = ops.mask_2to4(run.score(t, weight))
            masks.add(t, distributed.all_rows(mask, t.shape))
            if rule.learned is not None:
                whole = distributed.all_rows(weight, t.shape)
                rule.learned[t.name] = whole.to("cpu", copy=True)
    finally:
        if not rule.on_demand:
            for t in layers:
                t.weight().copy_(w0[t.name])
    return masks


@dataclass
class _Run:
    """The parts of a run that its steps share."""

    job: Job
    rule: Rule
    w0: dict[str, Tensor]
    states: dict[str, State]
    scalars: StepScalars | None = None
    is_dense: bool = False
    updated: set[str] = field(default_factory=set)
    mask_bits: dict[int, Tensor] = field(default_factory=dict)

    @contextlib.contextmanager
    def current_weights(self) -> Iterator[None]:
        """The model computes with the weights that the states stand for."""
        lean = self.job.learn.memory in ("balanced", "low")
        with contextlib.ExitStack() as stack:
            if self.rule.on_demand:
                stack.enter_context(weights_on_demand(self.job.targets, self.write))
            else:
                for target in self.job.targets.layers:
                    self.write(target, target.weight())
                if lean:
                    blocks = self.job.targets.blocks
                    stack.enter_context(recomputing(blocks, lambda _: contextlib.nullcontext()))
            if self.rule.max_grad_norm is None:
                stack.enter_context(consuming_gradients(self.job.targets.layers, self.update))
            yield

    def write(self, target: Target, out: Tensor) -> None:
        """Fill `out` with the weight to compute with now."""
        if self.is_dense:
            out.copy_(self.w0[target.name])
        else:
            self.rule.weight_(self.w0[target.name], self.states[target.name], out)

    @contextlib.contextmanager
    def dense(self, layers: tuple[Target, ...]) -> Iterator[None]:
        """Within the context `layers` compute with their original weights."""
        self._exchange(layers)
        self.is_dense = True
        try:
            yield
        finally:
            self._exchange(layers)
            self.is_dense = False

    def _exchange(self, layers: tuple[Target, ...]) -> None:
        """Let current and original weights trade places, where both are there."""
        if self.rule.on_demand:
            return
        distributed.reshard(self.job.model)
        for target in layers:
            own, other = target.weight(), self.w0[target.name]
            if distributed.world_size() == 1:
                target.parameter.data = target.canonical(other)
                self.w0[target.name] = own
            else:  # what is gathered is read from where the shards lie
                kept = own.clone()
                own.copy_(other)
                other.copy_(kept)

    def loss(self, tokens: Tensor) -> Loss:
        """What the rule minimises; in pieces where the model's logits allow it."""
        model, layers = self.job.model, self.job.targets.layers
        heads = tuple(t for t in layers if t.block == len(self.job.targets.blocks))
        everything: Dense = functools.partial(self.dense, layers)
        of_head: Dense = functools.partial(self.dense, heads) if heads else contextlib.nullcontext
        # The head of several processes is gathered once a step, so it is the same for all pieces.
        chunked = not (heads and distributed.world_size() > 1) and can_chunk(model, tokens)
        if not self.rule.distils:
            return chunked_next_token_loss if chunked else next_token_loss
        if chunked:
            return functools.partial(chunked_divergence_loss, dense=everything, dense_head=of_head)
        return functools.partial(divergence_loss, dense=everything)

    @torch.no_grad()
    def update(self, target: Target, grad: Tensor) -> None:
        """One step of one layer."""
        assert self.scalars is not None
        self.updated.add(target.name)
        out = None if self.rule.on_demand else target.weight()
        name = target.name
        self.rule.update_(self.w0[name], self.states[name], grad, self.scalars, out)

    @torch.no_grad()
    def weight(self, target: Target) -> Tensor:
        """The weight to compute with now, [N, K] or [E, N, K]."""
        w = target.weight()
        if self.rule.on_demand:
            w = torch.empty_like(w, memory_format=torch.contiguous_format)
            self.write(target, w)
        return w

    def score(self, target: Target, weight: Tensor) -> Tensor:
        """What decides the mask of a layer that computes with `weight`."""
        return self.rule.score(self.w0[target.name], self.states[target.name], weight)

    def step(self, batch: Tensor, loss: Loss) -> Tensor:
        """Forward, backward and the update of every layer; returns the loss.

        Raises:
            ProxsparseError: a layer has no gradient.
        """
        layers = self.job.targets.layers
        self.updated.clear()
        for target in layers:
            target.parameter.grad = None  # what an attempt to capture the step has left
        value = loss(self.job.model, batch)
        value.backward()  # type: ignore[no-untyped-call]
        if self.rule.max_grad_norm is not None:
            assert self.scalars is not None
            self.scalars = dataclasses.replace(
                self.scalars, grad_scale=_grad_scale(layers, self.rule.max_grad_norm)
            )
            for target in layers:
                grad = target.grad()
                if grad is not None:
                    self.update(target, grad)
                    target.parameter.grad = None
        for target in layers:
            if target.name not in self.updated:
                raise ProxsparseError(
                    f"{target.name} took no part in the loss, so nothing can be learned about "
                    "it: leave it dense with --ignore"
                )
        return value.detach()

    @torch.no_grad()
    def count(self) -> Tensor:
        """Two sums over all processes, int64 [2].

        The groups with at most two non-zeros in the variable being regularised; and the weights
        kept now and pruned at the last call, or the other way round.
        """
        counts = []
        for i, part in enumerate(_parts(self.job.targets.layers)):
            variables = [self.rule.variable(self.w0[t.name], self.states[t.name]) for t in part]
            groups = _joined(variables).view(-1, 4)
            good = (groups != 0).sum(-1, dtype=torch.uint8).le(2).sum()
            scores = [self.score(t, self.weight(t)) for t in part]
            bits = _pack_bits(ops.mask_2to4(_joined(scores)))
            flipped = _unpack_bits(bits ^ self.mask_bits.get(i, bits)).sum()
            self.mask_bits[i] = bits
            counts.append(torch.stack((good, flipped)))
        return distributed.sum_over_processes(torch.stack(counts).sum(0))


def _loop(run: _Run, done: int, stop: threading.Event) -> None:
    job, config = run.job, run.job.learn
    device, world = next(job.model.parameters()).device, distributed.world_size()
    batch_size = config.batch_size
    assert batch_size is not None
    if batch_size % world:
        raise ProxsparseError(
            f"--batch-size {batch_size} cannot be shared out evenly to {world} processes"
        )
    order = BatchOrder(job.tokens.shape[0], batch_size, config.seed)
    tokens = job.tokens.to(device)  # all at once: 8 bytes a token are nothing beside the weights
    peak = run.rule.lr if config.lr is None else config.lr
    loss = run.loss(tokens[:1])
    one = torch.ones((), device=device)

    def take_step(batch: Tensor, scalars: Tensor) -> Tensor:
        number, lr, lam = scalars.unbind()
        run.scalars = StepScalars(number, lr, lam, one)
        return run.step(batch, loss)

    losses: list[Tensor] = []
    num_weights = sum(math.prod(t.shape) for t in job.targets.layers)
    run.count()
    bar = Progress(
        "learning",
        config.steps,
        unit="step",
        done=done,
        leave=True,
        is_hidden=not distributed.is_main(),
    )
    began = time.perf_counter()
    with bar, _launched_whole(job, take_step) as step:
        for t in range(done, config.steps):
            mine = order.indices(t)[distributed.rank() :: world]
            batch = tokens[mine.to(device, non_blocking=True)]
            lr = peak * _schedule(t, config.steps)
            lam = run.rule.lam_at(t / config.steps, lr)
            losses.append(step(batch, torch.tensor([t + 1, lr, lam], dtype=torch.float64)))
            bar.update()
            finished = t + 1 == config.steps
            save = config.checkpoint_every > 0 and (t + 1) % config.checkpoint_every == 0
            # Processes stop together, so they ask each other only when they talk anyway.
            stopping = stop.is_set() and world == 1
            if len(losses) == _METRICS_EVERY or finished or save or stopping:
                stopping = distributed.any_process(stop.is_set(), device)
                counts = run.count()  # queued before the loss is waited for
                record = {"step": t + 1, "loss": _finite_mean(job, losses, t + 1), "lr": lr}
                good, flipped = counts.tolist()
                record["share_2to4"] = good / (num_weights // 4)
                record["share_flipped"] = flipped / num_weights
                record["tokens_per_second"] = round(
                    (t + 1 - done) * batch.numel() * world / (time.perf_counter() - began), 1
                )
                record["memory_gb"] = memory_gb(device)
                losses.clear()
                _report(job, record)
                if run.rule.starts_pruned:
                    _check_not_diverged(job.history, config.steps, peak)
                share = f"{record['share_2to4']:.1%}"
                bar.update(0, loss=f"{record['loss']:.4f}", groups_at_2to4=share)
            if not finished and (save or stopping) and job.checkpoints is not None:
                job.checkpoints.save(t + 1, _flatten(run.states))
            if stopping and not finished:
                if job.checkpoints is None:
                    raise Interrupted(
                        f"stopped after step {t + 1} of {config.steps}; nothing was saved"
                    )
                raise Interrupted(
                    f"stopped after step {t + 1} of {config.steps}, saved in "
                    f"{job.checkpoints.last_path()}: run the same command with --resume to go on"
                )


def _check_not_diverged(history: list[dict[str, float]], steps: int, peak: float) -> None:
    """Refuse a run that is far worse in its second half than where it began.

    Raises:
        ProxsparseError: names both losses, and half the learning rate.
    """
    first, last = history[0], history[-1]
    if 2 * last["step"] >= steps and last["loss"] > first["loss"] + _DIVERGED_BY:
        raise ProxsparseError(
            f"learning has diverged: the loss was {first['loss']:.3f} in the first steps and is "
            f"{last['loss']:.3f} at step {last['step']:.0f} of {steps}. Start anew with half the "
            f"learning rate, --lr {peak / 2:g}"
        )


def _launched_whole(job: Job, step: Step) -> contextlib.AbstractContextManager[Step]:
    """`step` as a CUDA graph, where one GPU holds the model and is to be fast."""
    device, *others = {p.device for p in job.model.parameters()}
    alone = not others and distributed.world_size() == 1
    if device.type == "cuda" and alone and job.learn.memory not in ("balanced", "low"):
        return as_graph(step, device)
    return contextlib.nullcontext(step)


def _report(job: Job, record: dict[str, float]) -> None:
    job.history.append(record)
    if job.metrics is not None:
        with (
            explaining_full_disk(job.metrics, "make room, then continue with --resume"),
            open(job.metrics, "a", encoding="utf-8") as file,
        ):
            file.write(json.dumps(record) + "\n")
    if job.track is not None:
        job.track(record)


def _parts(layers: tuple[Target, ...]) -> list[list[Target]]:
    """Neighbouring layers together, up to `_COUNTED_AT_ONCE` weights."""
    parts: list[list[Target]] = []
    room = 0
    for target in layers:
        size = target.parameter.numel()
        if size > room:
            parts.append([])
            room = _COUNTED_AT_ONCE
        parts[-1].append(target)
        room -= size
    return parts


def _joined(tensors: list[Tensor]) -> Tensor:
    """All elements in one dimension, 1-D; a single contiguous tensor is not copied."""
    flat = [x.flatten() for x in tensors]
    return flat[0] if len(flat) == 1 else torch.cat(flat)


def _pack_bits(mask: Tensor) -> Tensor:
    """Bool of any shape to uint8 [ceil(numel/8)], so that masks of two moments can be kept."""
    flat = nn.functional.pad(mask.flatten().to(torch.uint8), (0, -mask.numel() % 8)).reshape(-1, 8)
    powers = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    return (flat * powers).sum(-1, dtype=torch.uint8)


def _unpack_bits(packed: Tensor) -> Tensor:
    """The bits of uint8 [P] as uint8 [P, 8]."""
    return packed[:, None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1


def _schedule(t: int, steps: int) -> float:
    """Linear warm-up to 1, then linear decay towards 0, for t from 0 to steps - 1."""
    return min((t + 1) / max(_WARMUP * steps, 1), (steps - t) / max((1 - _WARMUP) * steps, 1))


@torch.no_grad()
def _grad_scale(layers: tuple[Target, ...], max_norm: float) -> Tensor:
    """The factor that clips the global gradient norm, computed on the device."""
    norms = [g.float().norm() for g in (t.grad() for t in layers) if g is not None]
    total = torch.stack(norms).norm()
    if distributed.world_size() > 1:
        total = distributed.sum_over_processes(total.square()).sqrt()
    return torch.clamp(max_norm / (total + 1e-6), max=1.0)


def _finite_mean(job: Job, losses: list[Tensor], last: int) -> float:
    """The mean of the latest losses.

    Raises:
        ProxsparseError: one of them is not finite; names the step and the last good checkpoint.
    """
    values = (
        distributed.sum_over_processes(torch.stack(losses)) / distributed.world_size()
    ).tolist()
    for i, value in enumerate(values):
        if not math.isfinite(value):
            step = last - len(values) + 1 + i
            good = job.checkpoints.last_path() if job.checkpoints else None
            raise ProxsparseError(
                f"the loss is {value} at step {step}; the last good checkpoint is "
                f"{good or 'none'}. Try a smaller --lr or --dtype float32"
            )
    return float(sum(values) / len(values))


def _flatten(states: dict[str, State]) -> dict[str, Tensor]:
    return {f"{name}/{key}": x for name, state in states.items() for key, x in state.items()}


def _restore(job: Job, states: dict[str, State], rows: dict[str, int]) -> int:
    """Copy the latest checkpoint into `states`; returns the steps it had done."""
    if not job.resume or job.checkpoints is None:
        return 0
    done = job.checkpoints.restore_(_flatten(states), rows, job.learn.steps)
    if job.metrics is not None and job.metrics.exists():
        job.history.extend(_records(job.metrics, done))
        write_text_whole(job.metrics, "".join(json.dumps(r) + "\n" for r in job.history))
    return done


def _records(path: Path, done: int) -> Iterator[dict[str, float]]:
    """The records of a killed run up to its last checkpoint; a torn line is the end of them."""
    for line in path.read_text("utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, TypeError, KeyError):
            return
        if not isinstance(step, int) or step > done:
            return
        yield record


@contextlib.contextmanager
def _only_targets_require_grad(model: nn.Module, targets: Targets) -> Iterator[None]:
    before = {p: p.requires_grad for p in model.parameters()}
    for p in before:
        p.requires_grad_(False)
    for t in targets.layers:
        t.parameter.requires_grad_(True)
    try:
        yield
    finally:
        for p, flag in before.items():
            p.requires_grad_(flag)
            p.grad = None


@contextlib.contextmanager
def _stop_requests() -> Iterator[threading.Event]:
    """An event that Ctrl-C or SIGTERM sets, so that the step under way can finish first."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def request(number: int, _: FrameType | None) -> None:
        if stop.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt  # asked twice: leave at once
        stop.set()

    before = {number: signal.signal(number, request) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
