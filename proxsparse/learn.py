"""The optimiser loop of the learned methods.

It is short on purpose: no trainer, no callbacks. A method is a `Rule` that says what state a layer
has, how one step changes it, and which weights it would keep; the loop owns everything else: data
order, schedule, gradients, checkpoints, metrics, interruption.

A run is a function of (model, tokens, settings): the batch of a step depends on the seed and the
step alone, so a resumed run sees what an undisturbed one would have seen.
"""

from __future__ import annotations

import abc
import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from proxsparse import ops
from proxsparse.checkpoint import Checkpoints
from proxsparse.config import LearnConfig
from proxsparse.errors import Interrupted, ProxsparseError
from proxsparse.evaluate import next_token_loss
from proxsparse.masks import Masks
from proxsparse.precision import eval_mode
from proxsparse.targets import Target, Targets

_METRICS_EVERY = 10  # steps between looks at the loss: each look makes a GPU wait for the host
_WARMUP = 0.1  # share of the steps

State = dict[str, Tensor]


@dataclass
class Job:
    """One pruning job, as every method receives it.

    Attributes:
        model: the dense model, on its device, in the precision to compute in.
        targets: what to prune.
        tokens: int64 [S, L] calibration blocks, on CPU.
        learn: settings of the loop; layer-by-layer methods ignore it.
        options: the method's own config.
        checkpoints: where to checkpoint; None keeps nothing on disk.
        metrics: path of metrics.jsonl; None keeps the history in memory only.
        resume: continue from the latest checkpoint.
        history: one dict per look at the loss, filled by the loop.
    """

    model: nn.Module
    targets: Targets
    tokens: Tensor
    learn: LearnConfig
    options: Any
    checkpoints: Checkpoints | None = None
    metrics: Path | None = None
    resume: bool = False
    history: list[dict[str, float]] = field(default_factory=list)


@dataclass(frozen=True)
class Moment:
    """Where in the run a step is.

    Attributes:
        step: its number, from 1.
        progress: share of the run that lies before it, in [0, 1).
        lr: its learning rate: linear warm-up over 10 % of the steps, then linear decay to 0.
        grad_scale: factor on the gradients, from clipping; a 0-d tensor on the model's device.
    """

    step: int
    progress: float
    lr: float
    grad_scale: Tensor


class Rule(abc.ABC):
    """What a learned method adds to the loop."""

    lr: float
    max_grad_norm: float | None = None

    @abc.abstractmethod
    def start(self, target: Target) -> State:
        """The state of a layer before the first step; saved in checkpoints, restored in place."""

    @abc.abstractmethod
    def sync_(self, target: Target, state: State) -> None:
        """Put the weight that `state` stands for into the model."""

    @abc.abstractmethod
    def update_(self, target: Target, state: State, grad: Tensor, moment: Moment) -> None:
        """One step: change the state in place and the model's weight with it."""

    @abc.abstractmethod
    def variable(self, state: State) -> Tensor:
        """The tensor that the regulariser drives to 2:4."""

    @abc.abstractmethod
    def score(self, target: Target, state: State) -> Tensor:
        """What ranks the weights of a group; the two largest magnitudes are kept."""


def learn(job: Job, rule: Rule) -> Masks:
    """Run `rule` for job.learn.steps steps; returns the masks and leaves the weights as they were.

    Raises:
        Interrupted: Ctrl-C or SIGTERM; a checkpoint was written if there is a place for one.
        ProxsparseError: the loss became NaN or infinite.
    """
    layers = job.targets.layers
    original = {t.name: t.weight().clone() for t in layers}
    states = {t.name: rule.start(t) for t in layers}
    done = _restore(job, states)
    try:
        with (
            eval_mode(job.model),
            _only_targets_require_grad(job.model, job.targets),
            _stop_requests() as stop,
        ):
            for target in layers:
                rule.sync_(target, states[target.name])
            _loop(job, rule, states, done, stop)
        masks = Masks()
        with torch.no_grad():
            for t in layers:
                masks.add(t, ops.mask_2to4(rule.score(t, states[t.name])))
    finally:
        for t in layers:
            t.set_weight_(original[t.name])
    return masks


def _loop(job: Job, rule: Rule, states: dict[str, State], done: int, stop: threading.Event) -> None:
    config, layers = job.learn, job.targets.layers
    device = next(job.model.parameters()).device
    order = _Order(job.tokens.shape[0], config.batch_size, config.seed)
    peak = rule.lr if config.lr is None else config.lr
    losses: list[Tensor] = []
    bar = tqdm(total=config.steps, initial=done, desc="learning", unit="step", disable=None)
    began = time.perf_counter()
    for t in range(done, config.steps):
        batch = job.tokens[order.indices(t)].to(device, non_blocking=True)
        loss = next_token_loss(job.model, batch)
        loss.backward()  # type: ignore[no-untyped-call]
        losses.append(loss.detach())
        with torch.no_grad():
            moment = Moment(
                step=t + 1,
                progress=t / config.steps,
                lr=peak * _schedule(t, config.steps),
                grad_scale=_grad_scale(layers, rule.max_grad_norm, device),
            )
            for target in layers:
                grad = target.grad()
                if grad is None:
                    raise ProxsparseError(
                        f"{target.name} took no part in the loss, so nothing can be learned about "
                        "it: leave it dense with --ignore"
                    )
                rule.update_(target, states[target.name], grad, moment)
                target.parameter.grad = None
        bar.update()
        finished = t + 1 == config.steps
        save = config.checkpoint_every > 0 and (t + 1) % config.checkpoint_every == 0
        if len(losses) == _METRICS_EVERY or finished or save or stop.is_set():
            record = {"step": t + 1, "loss": _finite_mean(job, losses, t + 1), "lr": moment.lr}
            record["share_2to4"] = _share_2to4(rule, states)
            record["tokens_per_second"] = round(
                (t + 1 - done) * batch.numel() / (time.perf_counter() - began), 1
            )
            losses.clear()
            job.history.append(record)
            if job.metrics is not None:
                with open(job.metrics, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record) + "\n")
            bar.set_postfix(loss=f"{record['loss']:.3f}", at_2to4=f"{record['share_2to4']:.1%}")
        if not finished and (save or stop.is_set()) and job.checkpoints is not None:
            job.checkpoints.save(t + 1, _flatten(states))
        if stop.is_set() and not finished:
            bar.close()
            if job.checkpoints is None:
                raise Interrupted(
                    f"stopped after step {t + 1} of {config.steps}; nothing was saved"
                )
            raise Interrupted(
                f"stopped after step {t + 1} of {config.steps}, saved in "
                f"{job.checkpoints.last_path()}: run the same command with --resume to go on"
            )
    bar.close()


def _schedule(t: int, steps: int) -> float:
    """Linear warm-up to 1, then linear decay towards 0, for t from 0 to steps - 1."""
    return min((t + 1) / max(_WARMUP * steps, 1), (steps - t) / max((1 - _WARMUP) * steps, 1))


def _grad_scale(layers: tuple[Target, ...], max_norm: float | None, device: torch.device) -> Tensor:
    """The factor that clips the global gradient norm, computed on the device."""
    if max_norm is None:
        return torch.ones((), device=device)
    norms = [g.float().norm() for g in (t.grad() for t in layers) if g is not None]
    total = torch.stack(norms).norm()
    return torch.clamp(max_norm / (total + 1e-6), max=1.0)


def _share_2to4(rule: Rule, states: dict[str, State]) -> float:
    """The share of groups with at most two non-zeros in the variable being regularised."""
    good = total = 0
    for state in states.values():
        groups = rule.variable(state).reshape(-1, 4)
        good += int((groups != 0).sum(-1).le(2).sum())
        total += groups.shape[0]
    return good / total


def _finite_mean(job: Job, losses: list[Tensor], last: int) -> float:
    """The mean of the latest losses.

    Raises:
        ProxsparseError: one of them is not finite; names the step and the last good checkpoint.
    """
    values = torch.stack(losses).tolist()
    for i, value in enumerate(values):
        if not math.isfinite(value):
            step = last - len(values) + 1 + i
            good = job.checkpoints.last_path() if job.checkpoints else None
            raise ProxsparseError(
                f"the loss is {value} at step {step}; the last good checkpoint is "
                f"{good or 'none'}. Try a smaller --lr or --dtype float32"
            )
    return float(sum(values) / len(values))


class _Order:
    """Which calibration blocks a step sees: a fresh permutation for each pass over the data."""

    def __init__(self, num_samples: int, batch_size: int, seed: int) -> None:
        self.num_samples, self.batch_size, self.seed = num_samples, batch_size, seed
        self._permutations: dict[int, Tensor] = {}

    def indices(self, t: int) -> Tensor:
        first = t * self.batch_size
        return torch.tensor([self._at(i) for i in range(first, first + self.batch_size)])

    def _at(self, i: int) -> int:
        epoch, position = divmod(i, self.num_samples)
        if epoch not in self._permutations:
            generator = torch.Generator().manual_seed(self.seed + epoch)
            self._permutations = {epoch: torch.randperm(self.num_samples, generator=generator)}
        return int(self._permutations[epoch][position])


def _flatten(states: dict[str, State]) -> dict[str, Tensor]:
    return {f"{name}/{key}": x for name, state in states.items() for key, x in state.items()}


def _restore(job: Job, states: dict[str, State]) -> int:
    """Copy the latest checkpoint into `states`; returns the steps it had done."""
    found = job.checkpoints.latest() if job.resume and job.checkpoints else None
    if found is None:
        return 0
    done, tensors = found
    for name, x in _flatten(states).items():
        x.copy_(tensors[name])
    if job.metrics is not None and job.metrics.exists():
        records = [json.loads(line) for line in job.metrics.read_text("utf-8").splitlines()]
        job.history.extend(record for record in records if record["step"] <= done)
        lines = "".join(json.dumps(record) + "\n" for record in job.history)
        job.metrics.write_text(lines, "utf-8")
    return done


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
