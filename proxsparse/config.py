"""Every setting. The command line's flags are generated from these dataclasses.

A field's `help` is its documentation, on the command line and in Python alike. Frozen, so that a
config can be hashed into a recipe and cannot change under a running job.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from proxsparse.errors import ProxsparseError

FP8_DYNAMIC = "FP8_DYNAMIC"  # the scheme of compressed-tensors: see `ops.reference.quantize_fp8`
SCHEMES = (FP8_DYNAMIC,)


def check_scheme(name: str | None, *, what: str = "--quantize") -> None:
    """Refuse a scheme of quantisation that nothing here knows.

    Args:
        name: of a scheme; None for weights as they are.
        what: says it.

    Raises:
        ProxsparseError: there is no such scheme.
    """
    if name is not None and name not in SCHEMES:
        raise ProxsparseError(f"{what} is {name!r}: choose {', '.join(SCHEMES)}")


def option(default: Any, help: str, *, minimum: float | None = None) -> Any:
    """A dataclass field with its help text and, for numbers, the smallest value allowed."""
    metadata = {"help": help, "minimum": minimum}
    return dataclasses.field(default=default, metadata=metadata)


def split_list(values: Iterable[str]) -> list[str]:
    """Values of a flag that were given several times, or with commas between.

    A regular expression ("re:...") may hold commas, so it is taken as it is.
    """
    found = []
    for value in values:
        parts = [value] if value.startswith("re:") else value.split(",")
        found += [part.strip() for part in parts if part.strip()]
    return found


class _Checked:
    """Checks each value against its field's type, choices and minimum when the config is made."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self))  # with those of the classes it is made of
        for field in dataclasses.fields(self):  # type: ignore[arg-type]
            value, minimum = getattr(self, field.name), field.metadata.get("minimum")
            choices = choices_of(hints[field.name])
            flag = "--" + field.name.replace("_", "-")
            expected = "" if choices else _why_not_of(hints[field.name], value)
            if expected:
                raise ProxsparseError(
                    f"{flag} is {value!r} ({type(value).__name__}): it must be {expected}"
                )
            if choices and value not in choices:
                raise ProxsparseError(f"{flag} is {value!r}: choose {', '.join(choices)}")
            if minimum is not None and value is not None and not value >= minimum:
                raise ProxsparseError(f"{flag} is {value}: it must be at least {minimum:g}")


_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    bool: ((bool,), "True or False"),
    int: ((int,), "a whole number"),
    float: ((int, float), "a number"),
    str: ((str,), "a string"),
    tuple[str, ...]: ((tuple, list), "a list of strings"),
}


def _why_not_of(hint: Any, value: Any) -> str:
    """What a value of this type must be, if it is none; empty when it is one."""
    kinds = [kind for kind in (typing.get_args(hint) or (hint,)) if kind is not type(None)]
    if hint == tuple[str, ...]:
        kinds = [hint]
    if value is None and type(None) in typing.get_args(hint):
        return ""
    for kind in kinds:
        types, _ = _KINDS[kind]
        is_one = isinstance(value, types) and (bool in types or not isinstance(value, bool))
        if is_one and (tuple not in types or all(isinstance(part, str) for part in value)):
            return ""
    return " or ".join(_KINDS[kind][1] for kind in kinds)


def _seed() -> Any:
    """The one seed of a run, which both drawing blocks and ordering them read."""
    return option(0, "Seed of the choice and the order of the calibration blocks.", minimum=0)


def choices_of(kind: Any) -> tuple[str, ...]:
    """The values of a `Literal` type; none of any other."""
    return typing.get_args(kind) if typing.get_origin(kind) is Literal else ()


@dataclasses.dataclass(frozen=True)
class CalibrationConfig(_Checked):
    """Which text the masks are learned on."""

    calibration: str = option(
        "c4",
        "Calibration text: a file of text or a table (.jsonl, .csv, .tsv, .parquet), perhaps "
        "compressed, or a folder; 'stdlib' (Python's own "
        "standard library, no download); 'self' (sampled from the model itself, no data needed); "
        "'c4', 'wikitext2' or any dataset name on the Hugging Face Hub.",
    )
    split: str | None = option(None, "Split of a Hub dataset (default: train).")
    text_column: str | None = option(
        None, "Column that holds the text, or the messages, of a table (default: found)."
    )
    num_calibration_samples: int | None = option(
        None,
        "Number of blocks of --max-seq-length tokens. Default: 128 for the layer-by-layer methods, "
        "steps x batch size for the learned ones, so that no block is seen twice. With fewer, "
        "blocks are reused.",
        minimum=1,
    )
    max_seq_length: int | None = option(
        None,
        "Tokens per calibration block. Default: the model's positions, at most 2,048; masks "
        "learned on shorter blocks are worse.",
        minimum=2,
    )
    seed: int = _seed()


@dataclasses.dataclass(frozen=True)
class TargetConfig(_Checked):
    """Which layers are pruned."""

    targets: tuple[str, ...] = option(
        (),
        "Layers to prune: module names (whole or the last parts), class names, or 're:' and a "
        "regular expression. Default: every linear layer of the decoder blocks.",
    )
    ignore: tuple[str, ...] = option(
        (),
        "Layers to leave dense, written like --targets. lm_head and the routers of "
        "mixture-of-experts models are left dense unless targeted by name; embeddings always are.",
    )


@dataclasses.dataclass(frozen=True)
class LearnConfig(_Checked):
    """The optimiser loop shared by the learned methods."""

    steps: int = option(400, "Optimiser steps.", minimum=1)
    tokens: str | None = option(
        None, "How long to learn, in tokens, such as 1.6M or 25M: sets the number of steps."
    )
    batch_size: int | None = option(
        None, "Blocks per step. Default: as many as make 4,096 tokens.", minimum=1
    )
    lr: float | None = option(None, "Peak learning rate (default: the method's).", minimum=0)
    lam: float | None = option(
        None, "Strength of the regulariser (default: the method's).", minimum=0
    )
    memory: Literal["auto", "fast", "balanced", "low"] = option(
        "auto",
        "What is kept per weight while learning. fast: float32 weights and states (20 bytes); "
        "balanced: the model's own dtype, states in bfloat16, gradients and "
        "logits never whole, activations recomputed (8 bytes); low: the same with 8-bit states "
        "(5 bytes; gates only). auto: the first that fits.",
    )
    checkpoint_every: int = option(
        50, "Steps between checkpoints; 0 writes one only when interrupted.", minimum=0
    )
    seed: int = _seed()


@dataclasses.dataclass(frozen=True)
class RunConfig(_Checked):
    """Where and in which precision to compute."""

    device: str = option(
        "auto", "auto, cpu, cuda, cuda:1, mps ...; auto takes a GPU if there is one."
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = option(
        "auto",
        "Precision while learning: auto, float32, bfloat16 or float16. The pruned model is always "
        "saved in the dtype of the base model.",
    )
    quantize: str | None = option(
        None,
        "FP8_DYNAMIC: round the weights to FP8 first, learn masks on what they have become, and "
        "write the result as a dense FP8 checkpoint, bitwise a mask on the rounded model.",
    )
    random_init: bool = option(
        False,
        "Ignore the model's weights and text: random weights of its shape (MODEL may be just a "
        "config.json) and random tokens. For measurements.",
    )
    tracker: str | None = option(
        None, "Also report metrics to one of accelerate's trackers, e.g. tensorboard or wandb."
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        check_scheme(self.quantize)


@dataclasses.dataclass(frozen=True)
class EvalConfig(_Checked):
    """What `eval` measures."""

    data: str | None = option(
        None,
        "Text to measure perplexity on, as for prune --calibration: a file, a folder, 'stdlib' "
        "(held-out modules of Python's library), 'wikitext2', 'c4' or a dataset on the Hub. "
        "Default: wikitext2, unless there are --tasks.",
    )
    split: str | None = option(
        None, "Split of a Hub dataset (default: test of wikitext2, validation of c4, else train)."
    )
    text_column: str | None = option(
        None, "Column that holds the text of a table (default: found)."
    )
    max_seq_length: int | None = option(
        None, "Tokens per block. Default: the model's positions, at most 2,048.", minimum=2
    )
    rolling: bool = option(False, "Score every token once, in lm-eval's rolling windows.")
    tasks: tuple[str, ...] = option((), "Tasks of lm-eval, such as arc_easy.")
    num_fewshot: int | None = option(
        None, "Examples before each question of a task (default: the task's).", minimum=0
    )
    limit: int | None = option(None, "Questions of each task (default: all).", minimum=1)
    include_path: str | None = option(None, "Folder with tasks of your own.")
    batch_size: int = option(8, "Blocks, or questions, per forward pass.", minimum=1)
    device: str = option("auto", "auto, cpu, cuda ...")


@dataclasses.dataclass(frozen=True)
class NoOptions(_Checked):
    """For methods that have no options of their own."""


@dataclasses.dataclass(frozen=True)
class SparseGPTOptions(_Checked):
    """Options of SparseGPT."""

    mask_only: bool = option(False, "Keep the original weights; use only SparseGPT's masks.")
    dampening: float = option(
        0.01, "Added to the Hessian's diagonal, as a share of its mean.", minimum=0
    )


@dataclasses.dataclass(frozen=True)
class ProxSparseOptions(_Checked):
    """Options of ProxSparse.

    By default a layer's lr and lam are in units of its weights, and the loss is that of gates. With
    --lam, or a preset, they are the numbers of the paper, the same in all layers (lr 1e-4 unless
    given), and so is its loss, the next token's cross-entropy. `lam_units` says which they are
    where the numbers of one run are given to another.
    """

    lam_units: Literal["auto", "weights", "absolute"] = option(
        "auto",
        "Of lr and lam. weights: those of a layer's weights; absolute: the paper's numbers. auto: "
        "absolute where --lam is given.",
    )
    lam_scaling: Literal["raw", "lr"] = option(
        "raw",
        "Of a --lam that is given. raw: the same at every step, as the published code; lr: times "
        "the step's learning rate relative to its peak.",
    )
    lam2: float = option(0.0, "Strength of the frozen-weight regulariser.", minimum=0)
    reg_eps: float = option(0.1, "Its eps, in units of the weights.", minimum=1e-12)
    max_grad_norm: float = option(1.0, "The global gradient norm is clipped to this.", minimum=0)


@dataclasses.dataclass(frozen=True)
class MaskLLMOptions(_Checked):
    """Options of MaskLLM."""

    distil: bool = option(
        False,
        "Minimise the divergence from the dense model, as gates do, and not the next token's "
        "cross-entropy, as published.",
    )


# The options of each method, in the order users see; `methods.METHODS` has the functions.
METHOD_OPTIONS: dict[str, type[Any]] = {
    "gates": NoOptions,
    "proxsparse": ProxSparseOptions,
    "maskllm": MaskLLMOptions,
    "sparsegpt": SparseGPTOptions,
    "wanda": NoOptions,
    "magnitude": NoOptions,
}


@dataclasses.dataclass(frozen=True)
class MethodConfig(TargetConfig, RunConfig):
    """Every setting of a run, typed: one class for each method, which names the method.

    What is left at its default counts as not given.
    """

    method: typing.ClassVar[str]

    def given(self) -> dict[str, Any]:
        """The settings that differ from their defaults."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return {name: value for name, value in values.items() if value != defaults[name]}


@dataclasses.dataclass(frozen=True)
class GatesConfig(MethodConfig, CalibrationConfig, LearnConfig):
    """Every setting of gates."""

    method = "gates"


@dataclasses.dataclass(frozen=True)
class ProxSparseConfig(MethodConfig, CalibrationConfig, LearnConfig, ProxSparseOptions):
    """Every setting of ProxSparse."""

    method = "proxsparse"


@dataclasses.dataclass(frozen=True)
class MaskLLMConfig(MethodConfig, CalibrationConfig, LearnConfig, MaskLLMOptions):
    """Every setting of MaskLLM."""

    method = "maskllm"


@dataclasses.dataclass(frozen=True)
class SparseGPTConfig(MethodConfig, CalibrationConfig, SparseGPTOptions):
    """Every setting of SparseGPT."""

    method = "sparsegpt"


@dataclasses.dataclass(frozen=True)
class WandaConfig(MethodConfig, CalibrationConfig):
    """Every setting of Wanda."""

    method = "wanda"


@dataclasses.dataclass(frozen=True)
class MagnitudeConfig(MethodConfig):
    """Every setting of magnitude."""

    method = "magnitude"


def as_dict(config: Any) -> dict[str, Any]:
    """A config as plain JSON values, tuples as lists."""
    return {
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(config).items()
    }


def replace(config: Any, values: Mapping[str, Any]) -> Any:
    """`config` with the fields of `values` that it has and that are not None."""
    names = {field.name for field in dataclasses.fields(config)}
    changes = {k: v for k, v in values.items() if k in names and v is not None}
    return dataclasses.replace(config, **changes)
