"""Getting a Hugging Face model in, and turning what can go wrong there into one clear sentence."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from proxsparse.errors import ProxsparseError
from proxsparse.models.files import model_name
from proxsparse.models.forms import check_config
from proxsparse.models.targets import Targets


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM with its tokenizer and where it came from."""

    model: Any
    tokenizer: Any
    id: str
    revision: str | None


def resolve_device(name: str) -> torch.device:
    """The torch device behind "auto" or a device string.

    Raises:
        ProxsparseError: malformed, or not there.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ProxsparseError(f"--device {name} cannot be used here: {reason}") from error
    return device


def build_model(model: str | os.PathLike[str], device: torch.device) -> Any:
    """A causal LM of this shape with random weights, made on `device`; meta costs no memory.

    A packed model comes as the dense one of its shape.

    Args:
        model: a local directory, a config.json or a name on the Hugging Face Hub.
        device: where to make it.

    Raises:
        ProxsparseError: no such configuration, or not one of a causal LM.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    name = model_name(model)
    try:
        check_config(Path(name))
        config = AutoConfig.from_pretrained(name)
        with device:
            build: Any = AutoModelForCausalLM.from_config
            built = build(config, dtype=config.dtype)
    except Exception as error:  # a stranger's files can fail in any line of transformers
        raise ProxsparseError(
            f"{name} cannot be loaded as a causal language model: {_first_lines(error)}"
        ) from error
    return built.eval()


def load_model(model: str | os.PathLike[str], device: torch.device) -> LoadedModel:
    """Load a causal LM (safetensors only, its own dtype) and its tokenizer.

    Weights go from the file to the device one by one; there is never a second copy.

    Args:
        model: a local directory or a name on the Hugging Face Hub.
        device: where to put it.

    Raises:
        ProxsparseError: not found, not a causal LM, without safetensors, or without tokenizer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    name = model_name(model)
    try:
        check_config(Path(name))
        config = AutoConfig.from_pretrained(name)
        result: Any = AutoModelForCausalLM.from_pretrained(
            name,
            config=config,
            dtype="auto",
            use_safetensors=True,
            output_loading_info=True,
            device_map={"": device},
        )
        loaded, info = result
        tokenizer = AutoTokenizer.from_pretrained(name)
    except Exception as error:  # as above
        raise ProxsparseError(
            f"{name} cannot be loaded as a causal language model: {_first_lines(error)}"
        ) from error
    missing = sorted(info["missing_keys"])
    if missing:  # transformers would fill them with random numbers
        raise ProxsparseError(
            f"{name} lacks {len(missing)} weights of {type(loaded).__name__}, first {missing[0]}: "
            "the checkpoint is incomplete, or of another architecture"
        )
    revision = getattr(loaded.config, "_commit_hash", None)
    return LoadedModel(loaded, tokenizer, name, revision)


def check_finite(targets: Targets) -> None:
    """Refuse a model with NaN or infinite weights: every method would spread them in silence.

    Raises:
        ProxsparseError: names the first such layer and how many of its weights are bad.
    """
    for target in targets.layers:
        bad = int((~torch.isfinite(target.weight())).sum())
        if bad:
            raise ProxsparseError(
                f"{target.name} has {bad} weights that are NaN or infinite: the checkpoint is "
                "damaged or overflowed in float16; load a sound one"
            )


def save_model(model: nn.Module, tokenizer: Any, directory: Path) -> None:
    """Write model and tokenizer as a dense Hugging Face checkpoint.

    Raises:
        ProxsparseError: the disk is full or not writable.
    """
    from safetensors import SafetensorError

    try:
        model.save_pretrained(directory)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
    except (OSError, SafetensorError) as error:
        raise ProxsparseError(f"the model could not be written to {directory}: {error}") from error


def _first_lines(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


def state_bytes(model: nn.Module) -> int:
    """Bytes of everything in a model's state dict; tensors that share memory count once."""
    tensors = {x.data_ptr(): x.numel() * x.element_size() for x in model.state_dict().values()}
    return sum(tensors.values())
