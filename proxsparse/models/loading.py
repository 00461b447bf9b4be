"""Getting a Hugging Face model in, and turning what can go wrong there into one clear sentence."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from proxsparse.config import FP8_DYNAMIC
from proxsparse.errors import ProxsparseError
from proxsparse.models.checkpoint_files import INDEX, QUANTISATION, open_checkpoint, write_index
from proxsparse.models.files import model_name
from proxsparse.models.forms import check_config
from proxsparse.models.fp8 import find_entry, scale_weights_
from proxsparse.models.gguf import dequantising, gguf_arguments, quantised_types
from proxsparse.models.positions import text_config
from proxsparse.models.targets import Targets, check_in_memory


@dataclass(frozen=True)
class LoadedModel:
    """A causal LM with its tokenizer and where it came from.

    `is_made` says that no safetensors file holds its weights: they are random, or dequantised from
    a GGUF file of the types `dequantised_from`. Of a checkpoint in FP8, the weights are what it
    stands for, and `scales` has those of each layer, float32 [N].
    """

    model: Any
    tokenizer: Any
    id: str
    revision: str | None
    is_made: bool = False
    dequantised_from: str | None = None
    scales: dict[str, Tensor] = field(default_factory=dict)

    @property
    def scheme(self) -> str | None:
        """How the files round the weights: "FP8_DYNAMIC" or None."""
        return FP8_DYNAMIC if self.scales else None


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
        model: a local directory, a config.json, a GGUF file or a name on the Hugging Face Hub.
        device: where to make it.

    Raises:
        ProxsparseError: no such configuration, or not one of a causal LM.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    name = model_name(model)
    try:
        place, gguf = gguf_arguments(name)
        if not gguf:
            check_config(Path(name))
        config = AutoConfig.from_pretrained(place, **gguf)
        with device:
            build: Any = AutoModelForCausalLM.from_config
            built = build(config, dtype=torch.bfloat16 if gguf else config.dtype)
    except ProxsparseError:
        raise
    except Exception as error:  # a stranger's files can fail in any line of transformers
        raise ProxsparseError(
            f"{name} cannot be loaded as a causal language model: {_first_lines(error)}"
        ) from error
    return built.eval()


def load_model(model: str | os.PathLike[str], device: torch.device) -> LoadedModel:
    """Load a causal LM (safetensors only, its own dtype) and its tokenizer.

    Weights go from the file to the device one by one; there is never a second copy. Those of a
    GGUF file are dequantised to bfloat16 in the CPU's memory first. A checkpoint of scheme
    FP8_DYNAMIC is loaded as the dense model that it stands for.

    Args:
        model: a local directory, a GGUF file or a name on the Hugging Face Hub.
        device: where to put it.

    Raises:
        ProxsparseError: not found, not a causal LM, without safetensors, or without tokenizer.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    name = model_name(model)
    try:
        place, gguf = gguf_arguments(name)
        if not gguf:
            check_config(Path(name))
        config = AutoConfig.from_pretrained(place, **gguf)
        _check_config(name, config)
        is_fp8 = find_entry(config.to_dict()) is not None
        if is_fp8:
            _drop_quantisation(config)
        architectures = tuple(getattr(config, "architectures", None) or ())
        result: Any = AutoModelForCausalLM.from_pretrained(
            place,
            config=config,
            dtype=_dtype(config, bool(gguf), is_fp8),
            use_safetensors=not gguf,
            output_loading_info=True,
            **({**gguf, **dequantising()} if gguf else {"device_map": {"": device}}),
        )
        loaded, info = result
        tokenizer = AutoTokenizer.from_pretrained(place, **gguf)
    except ProxsparseError:
        raise
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
    _check_class(name, architectures, loaded)
    if gguf:
        return _dequantised(loaded.to(device, torch.bfloat16), tokenizer, name)
    revision = getattr(loaded.config, "_commit_hash", None)
    scales = scale_weights_(loaded, open_checkpoint(name, revision)) if is_fp8 else {}
    return LoadedModel(loaded, tokenizer, name, revision, scales=scales)


def _dtype(config: Any, is_gguf: bool, is_fp8: bool) -> Any:
    if is_gguf:
        return torch.bfloat16
    return (config.dtype or torch.bfloat16) if is_fp8 else "auto"


def _drop_quantisation(config: Any) -> None:
    """Let transformers build the dense model: e4m3 numbers it casts to 16 bits as they are."""
    for key in QUANTISATION:
        if hasattr(config, key):
            delattr(config, key)


def _dequantised(model: Any, tokenizer: Any, name: str) -> LoadedModel:
    """What a GGUF file stands for; some versions of transformers keep on calling it quantised."""
    model.config.__dict__.pop("quantization_config", None)
    model.hf_quantizer = model.quantization_method = None
    model.is_quantized = False
    types = quantised_types(name)
    logging.getLogger(__name__).info(
        "%s is quantised (%s); what is read is its dequantised bfloat16 model", name, types
    )
    return LoadedModel(model.eval(), tokenizer, name, None, is_made=True, dequantised_from=types)


def _check_config(name: str, config: Any) -> None:
    if getattr(config, "is_encoder_decoder", False):
        kind = ", ".join(getattr(config, "architectures", None) or [type(config).__name__])
        raise ProxsparseError(
            f"{name} is an encoder-decoder ({kind}), of which a causal language model would be a "
            "part only: only decoder-only models can be pruned"
        )
    if (Path(name) / "adapter_config.json").is_file():
        raise ProxsparseError(
            f"{name} holds an adapter (adapter_config.json): merge it first, with peft's "
            "merge_and_unload(), and save the merged model"
        )


def _check_class(name: str, architectures: tuple[str, ...], loaded: Any) -> None:
    """Refuse a checkpoint of another kind of model than the one that was made of it.

    A larger model that generates text is none (its other parts are carried over), nor is the model
    without a head.
    """
    import transformers

    base_class = type(getattr(loaded, "base_model", loaded)).__name__
    for architecture in architectures:
        known = getattr(transformers, architecture, None)
        can_generate = getattr(known, "can_generate", lambda: True)
        if architecture in (type(loaded).__name__, base_class) or can_generate():
            return
    if architectures:
        raise ProxsparseError(
            f"{name} is a {architectures[0]}, which generates no text; transformers made a "
            f"{type(loaded).__name__} of it, which is another model: give a causal language model"
        )


@torch.no_grad()
def check_causal(model: Any) -> None:
    """Refuse a model whose outputs depend on later tokens; next-token losses mean nothing there.

    Raises:
        ProxsparseError: the first position's logits change with the tokens after it, by more than
            rounding could make them.

    Cost: a forward pass of two sequences of eight tokens.
    """
    if next(model.parameters()).is_meta:
        return
    tokens = torch.tensor([[5, *[6] * 7], [5, *[7] * 7]], device=model.device)
    tokens %= text_config(model).vocab_size
    try:
        logits = model(input_ids=tokens, use_cache=False).logits[:, 0].float()
    except Exception as error:  # whatever a model wants besides tokens, its job will say so
        log = logging.getLogger(__name__)
        log.warning("%s was not checked to be causal: %s", type(model).__name__, error)
        return
    rounding = max(torch.finfo(model.dtype).eps, 1e-4)
    if bool((logits[0] - logits[1]).std() > rounding * logits.std()):
        raise ProxsparseError(
            f"{type(model).__name__} sees later tokens: what it predicts at a position changes "
            "with the next one. Only causal language models can be pruned (of some encoders a "
            "decoder is made by is_decoder in config.json)"
        )


def check_finite(targets: Targets) -> None:
    """Refuse a model with NaN or infinite weights: every method would spread them in silence.

    Raises:
        ProxsparseError: names the first such layer and how many of its weights are bad.
    """
    check_in_memory(targets.layers)
    for target in targets.layers:
        bad = int((~torch.isfinite(target.weight())).sum())
        if bad:
            raise ProxsparseError(
                f"{target.name} has {bad} weights that are NaN or infinite: the checkpoint is "
                "damaged or overflowed in float16; load a sound one"
            )


def save_model(model: nn.Module, tokenizer: Any, directory: Path) -> None:
    """Write model and tokenizer as a dense Hugging Face checkpoint, always with an index.

    Raises:
        ProxsparseError: the disk is full or not writable.
    """
    from safetensors import SafetensorError

    try:
        model.save_pretrained(directory)  # type: ignore[operator]
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)
        if not (directory / INDEX).is_file():
            weight_map = open_checkpoint(str(directory)).weight_map
            write_index(directory, weight_map, state_bytes(model))
    except (OSError, SafetensorError) as error:
        raise ProxsparseError(f"the model could not be written to {directory}: {error}") from error


def _first_lines(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


def state_bytes(model: nn.Module) -> int:
    """Bytes of everything in a model's state dict; tensors that share memory count once."""
    tensors = {x.data_ptr(): x.numel() * x.element_size() for x in model.state_dict().values()}
    return sum(tensors.values())
