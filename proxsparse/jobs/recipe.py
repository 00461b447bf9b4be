"""A recipe: every setting of one pruning job, resolved, checked and ready to be written down."""

from __future__ import annotations

import dataclasses
import difflib
import hashlib
import json
import math
import re
from typing import TYPE_CHECKING, Any

from proxsparse.config import (
    CalibrationConfig,
    LearnConfig,
    RunConfig,
    TargetConfig,
    as_dict,
    replace,
)
from proxsparse.errors import ProxsparseError
from proxsparse.methods import METHODS, Method, get_method

if TYPE_CHECKING:
    from torch import nn  # settings are resolved before torch is loaded

_LAYERWISE_SAMPLES = 128
_MAX_SEQ_LENGTH = 2048  # by default; models with fewer positions take as many as they have
_TOKENS_PER_STEP = 4096

# The settings published with the paper, as in the scripts of its reference code (batch 1, 400
# samples); the ones with lam2 are its variants with the frozen-weight regulariser.
_PAPER = {"method": "proxsparse", "batch_size": 1, "steps": 400, "max_seq_length": 4096}
PRESETS: dict[str, dict[str, Any]] = {
    "llama-2-7b": {**_PAPER, "lam": 0.25, "lr": 1e-4},
    "llama-2-13b": {**_PAPER, "lam": 0.5, "lr": 1e-4},
    "llama-2-13b-frozen": {**_PAPER, "lam": 0.5, "lr": 1e-4, "lam2": 0.25, "reg_eps": 0.5},
    "llama-3.1-8b": {**_PAPER, "lam": 0.85, "lr": 5e-5},
    "llama-3.1-8b-frozen": {**_PAPER, "lam": 0.85, "lr": 5e-5, "lam2": 1.0, "reg_eps": 0.1},
    "mistral-7b-v0.1": {**_PAPER, "lam": 20.0, "lr": 5e-5},
    "mistral-7b-v0.3": {**_PAPER, "lam": 25.0, "lr": 5e-5},
    "openllama-7b-v2": {**_PAPER, "lam": 1.0, "lr": 1e-4, "max_seq_length": 2048},
    "qwen2.5-14b": {**_PAPER, "lam": 0.2, "lr": 1e-4},
}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All settings of one job."""

    method: Method
    calibration: CalibrationConfig
    targets: TargetConfig
    learn: LearnConfig
    run: RunConfig
    options: Any

    @property
    def num_samples(self) -> int:
        """Calibration blocks the job asks for, once it is `for_model`."""
        if self.calibration.num_calibration_samples is not None:
            return self.calibration.num_calibration_samples
        if not self.method.learned:
            return _LAYERWISE_SAMPLES
        assert self.learn.batch_size is not None
        return self.learn.steps * self.learn.batch_size

    def for_model(self, model: nn.Module, num_processes: int = 1) -> Recipe:
        """The recipe with every value decided: what depends on the model, and the method's own.

        A length in tokens becomes a number of steps.

        Args:
            model: the model; the meta device will do.
            num_processes: that share a step; the default batch size is a multiple of it.
        """
        from proxsparse.models.positions import num_positions  # settings come before torch

        positions = num_positions(model)
        length = self.calibration.max_seq_length or min(
            positions or _MAX_SEQ_LENGTH, _MAX_SEQ_LENGTH
        )
        share = max(1, _TOKENS_PER_STEP // length) / num_processes
        batch_size = self.learn.batch_size or math.ceil(share) * num_processes
        steps = self.learn.steps
        if self.learn.tokens is not None:
            steps = math.ceil(_count(self.learn.tokens) / (batch_size * length))
        learn = replace(self.learn, {"batch_size": batch_size, "steps": steps})
        learn, options = self.method.resolve(dataclasses.replace(learn, tokens=None), self.options)
        return dataclasses.replace(
            self,
            calibration=replace(self.calibration, {"max_seq_length": length}),
            learn=learn,
            options=options,
        )

    def as_dict(self) -> dict[str, Any]:
        """The settings that took part, as plain JSON values."""
        data = {**as_dict(self.calibration), "num_calibration_samples": self.num_samples}
        return {
            "method": self.method.name,
            **as_dict(self.targets),
            **(data if self.method.needs_data else {}),
            **(as_dict(self.learn) if self.method.learned else {}),
            **as_dict(self.options),
            **as_dict(self.run),
        }

    def key(self, *inputs: str) -> str:
        """A hash of what decides the result: settings, and fingerprints of model and data."""
        settings = self.as_dict()
        for harmless in ("checkpoint_every", "calibration", "split", "text_column", "tracker"):
            settings.pop(harmless, None)
        if settings["quantize"] is None:  # as runs of earlier versions have it
            del settings["quantize"]
        text = json.dumps([settings, inputs], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()


def make_recipe(
    method: str | Method | None = None, preset: str | None = None, **settings: Any
) -> Recipe:
    """Resolve a method's name, a preset and flat settings into a `Recipe`.

    Args:
        method: a method or its name; default the preset's, else "gates".
        preset: a key of `PRESETS`; settings given explicitly win over it.
        **settings: fields of the config dataclasses; None means not given.

    Raises:
        ProxsparseError: unknown method, preset or setting; a setting the method does not use.
    """
    if preset is not None:
        if preset not in PRESETS:
            raise ProxsparseError(f"unknown preset {preset!r}: choose one of {', '.join(PRESETS)}")
        values = dict(PRESETS[preset])
        own = values.pop("method")
        if method not in (None, own):
            raise ProxsparseError(f"preset {preset!r} is for method {own!r}, not {method!r}")
        method = own
    else:
        values = {}
    given = {key: value for key, value in settings.items() if value is not None}
    if "tokens" in given:
        if "steps" in given:
            raise ProxsparseError(
                f"--tokens {given['tokens']} and --steps {given['steps']} both say how long to "
                "learn: give one of them"
            )
        _count(given["tokens"])
        given["tokens"] = str(given["tokens"])
    values.update(given)
    chosen = method if isinstance(method, Method) else get_method(method or "gates")
    used: list[type[Any]] = [TargetConfig, RunConfig, chosen.config]
    used += [CalibrationConfig] if chosen.needs_data else []
    used += [LearnConfig] if chosen.learned else []
    allowed = {name for config in used for name in _names(config)}
    for key in values:
        if key not in allowed:
            raise ProxsparseError(_why_not(key, chosen, allowed))
    return Recipe(
        chosen,
        replace(CalibrationConfig(), values),
        replace(TargetConfig(), {k: _as_tuple(v) for k, v in values.items()}),
        replace(LearnConfig(), values),
        replace(RunConfig(), values),
        replace(chosen.config(), values),
    )


def _count(tokens: str | int) -> int:
    """A number of tokens such as 4096, "1.6M" or "25M".

    Raises:
        ProxsparseError: it is none.
    """
    units = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
    match = re.fullmatch(r"(\d+|\d*\.\d+)\s*([kmb]?)", str(tokens).replace(",", "").lower())
    count = round(float(match[1]) * units[match[2]]) if match else 0
    if count < 1:
        raise ProxsparseError(
            f"--tokens is {tokens!r}: give a number of at least 1, such as 1638400, 1.6M or 25M"
        )
    return count


def _names(config: type[Any]) -> list[str]:
    return [field.name for field in dataclasses.fields(config)]


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _why_not(key: str, method: Method, allowed: set[str]) -> str:
    owners = [
        m.name
        for m in METHODS.values()
        if key in _names(m.config)
        or (m.learned and key in _names(LearnConfig))
        or (m.needs_data and key in _names(CalibrationConfig))
    ]
    if owners:
        return f"{key} is not used by method {method.name!r}, only by {', '.join(owners)}: drop it"
    close = difflib.get_close_matches(key, sorted(allowed), n=1)
    hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(sorted(allowed))}"
    return f"unknown setting {key!r}: {hint}"
