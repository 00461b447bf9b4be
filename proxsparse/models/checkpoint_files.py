"""A checkpoint as the files it is: what a job writes is the input directory with weights replaced.

transformers loads what its class has a place for and saves that. Whatever else a checkpoint holds
(another tower, heads for speculative decoding, a processor, code, a licence) would vanish in
between, and a wider dtype would be rounded. So tensors are taken from the files, changed where they
must be, and written to files of the same names; everything else is copied. The trade-off: a tensor
that is changed must have a counterpart in the files, see `in_file`.
"""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

import torch
from torch import Tensor

from proxsparse.errors import ProxsparseError
from proxsparse.models.masks import FILE, OLD_FILE

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
OURS = ("proxsparse.json", FILE, OLD_FILE, "metrics.jsonl", "training.png")
# Forms of the weights before a job changed them: beside the new ones they would be another model.
_WEIGHT_SUFFIXES = (
    *(".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".ggml", ".npz"),
    *(".onnx", ".onnx_data", ".tflite", ".pkl", ".ot", ".nemo", ".mlmodel", ".index.json"),
)
_WEIGHT_FOLDERS = ("original", "onnx", "openvino", "coreml", "metal")
# Where a config.json says how the weights are quantised.
QUANTISATION = ("quantization_config", "compression_config")
# A tensor of the files, by name -> what is written in its place, by name.
Change = Callable[[str, Tensor], dict[str, Tensor]]
_NOTHING = torch.empty(0)  # stands for a tensor of which only the name matters


@dataclass(frozen=True)
class CheckpointFiles:
    """The files of a checkpoint in safetensors.

    Attributes:
        directory: where they lie.
        weight_map: tensor name -> name of its file, of everything that the files hold.
    """

    directory: Path
    weight_map: dict[str, str]

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape."""
        from safetensors import safe_open

        shapes = {}
        for name in sorted(set(self.weight_map.values())):
            with safe_open(str(self.directory / name), framework="pt") as file:
                for key in file.keys():  # noqa: SIM118 - it is no dict
                    shapes[key] = tuple(file.get_slice(key).get_shape())
        return shapes


def open_checkpoint(name: str, revision: str | None = None) -> CheckpointFiles:
    """The files of a local directory or, with all that lies beside the weights, of the Hub.

    Raises:
        ProxsparseError: there is no safetensors file, or it cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    try:
        directory = _directory(name, revision)
        if (directory / WEIGHTS).is_file():
            names = {WEIGHTS}
        else:
            index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
            names = set(index["weight_map"].values())
        _check_file_names(names, name)
        weight_map = {}
        for file_name in sorted(names):
            with safe_open(str(directory / file_name), framework="pt") as file:
                weight_map.update(dict.fromkeys(file.keys(), file_name))
    except ProxsparseError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ProxsparseError(
            f"the safetensors files of {name} cannot be read ({error}): a checkpoint has "
            f"{WEIGHTS}, or the files that its {INDEX} names"
        ) from error
    return CheckpointFiles(directory, weight_map)


def _check_file_names(names: Iterable[str], checkpoint: str) -> None:
    """Refuse an index whose files lie elsewhere: a result would be written there as well.

    Raises:
        ProxsparseError: names the first such file.
    """
    for name in names:
        parts = PurePath(name).parts
        if PurePath(name).is_absolute() or ".." in parts or not parts:
            raise ProxsparseError(
                f"the {INDEX} of {checkpoint} names the file {name!r}, which lies outside it: a "
                "checkpoint's files are in its directory"
            )


def read_tensor(files: CheckpointFiles, name: str) -> Tensor:
    """One tensor of the files, on the CPU."""
    from safetensors import safe_open

    path = files.directory / files.weight_map[name]
    with safe_open(str(path), framework="pt") as file:
        tensor: Tensor = file.get_tensor(name)
    return tensor


def _directory(name: str, revision: str | None) -> Path:
    if Path(name).is_dir():
        return Path(name)
    from huggingface_hub import snapshot_download

    others = [f"*{suffix}" for suffix in _WEIGHT_SUFFIXES[1:] if suffix != ".index.json"]
    others += [f"{folder}/*" for folder in _WEIGHT_FOLDERS] + ["consolidated*"]
    return Path(snapshot_download(name, revision=revision, ignore_patterns=others))


def write_checkpoint(
    source: CheckpointFiles,
    directory: Path,
    change: Change,
    *,
    quantization_config: dict[str, Any] | None = None,
    with_ours: bool = False,
) -> None:
    """Write `source` to `directory` with its tensors changed, and all its other files.

    Args:
        source: the checkpoint.
        directory: where to; files that are there already stay.
        change: a tensor's name and the tensor (on the CPU, as the file has it) to what takes its
            place in the file.
        quantization_config: what config.json says from now on; by default nothing.
        with_ours: whether our report, masks and metrics belong to the result too.

    Raises:
        ProxsparseError: the disk is full or not writable.

    Cost: one file's tensors in memory at a time.
    """
    from safetensors import SafetensorError, safe_open
    from safetensors.torch import save_file

    try:
        _copy_side_files(source, directory, with_ours)
        _write_config(source.directory, directory, quantization_config)
        weight_map: dict[str, str] = {}
        total = 0
        for file_name in sorted(set(source.weight_map.values())):
            tensors: dict[str, Tensor] = {}
            with safe_open(str(source.directory / file_name), framework="pt") as file:
                metadata = file.metadata() or {"format": "pt"}
                for name in file.keys():  # noqa: SIM118 - it is no dict
                    tensors |= change(name, file.get_tensor(name))
            tensors = {name: x.contiguous() for name, x in tensors.items()}
            (directory / file_name).parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, directory / file_name, metadata=metadata)
            weight_map |= dict.fromkeys(tensors, file_name)
            total += sum(x.numel() * x.element_size() for x in tensors.values())
        write_index(directory, weight_map, total)
    except (OSError, SafetensorError) as error:
        raise ProxsparseError(f"the model could not be written to {directory}: {error}") from error


def write_index(directory: Path, weight_map: dict[str, str], total_bytes: int) -> None:
    """Write the index, without which some loaders take every *.safetensors file for weights."""
    index = {
        "metadata": {"total_size": total_bytes},
        "weight_map": dict(sorted(weight_map.items())),
    }
    (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_side_files(source: CheckpointFiles, directory: Path, with_ours: bool) -> None:
    root = source.directory
    is_ours = (root / OURS[0]).is_file()
    left_out = []
    for path in sorted(_side_files(root, directory)):
        name = path.relative_to(root).as_posix()
        if name in OURS and (is_ours or name == OLD_FILE):
            if not with_ours:
                continue
            name = FILE if name == OLD_FILE else name
        elif name == "config.json" or name in source.weight_map.values() or name == INDEX:
            continue
        elif name.endswith(_WEIGHT_SUFFIXES):
            left_out.append(name)
            continue
        if not (directory / name).exists():
            (directory / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, directory / name)
    if left_out:
        logging.getLogger(__name__).warning(
            "not copied, because they would hold other weights than the result: %s",
            ", ".join(left_out),
        )


def _side_files(folder: Path, output: Path) -> list[Path]:
    """All files below a folder, without hidden folders, `output`, and folders of other weights."""
    found: list[Path] = []
    for path in folder.iterdir():
        if path.is_file():
            found.append(path)
        elif path.is_dir() and not path.name.startswith(".") and path.name not in _WEIGHT_FOLDERS:
            inside = _side_files(path, output) if path.resolve() != output.resolve() else []
            if not any(p.name.endswith(_WEIGHT_SUFFIXES) for p in inside):
                found += inside
    return found


def _write_config(
    source: Path, directory: Path, quantization_config: dict[str, Any] | None
) -> None:
    text = (source / "config.json").read_text(encoding="utf-8")
    config = json.loads(text)
    parts = [config, *(part for part in config.values() if isinstance(part, dict))]
    stale = [part.pop(key) for part in parts for key in QUANTISATION if key in part]
    if quantization_config is not None:
        config["quantization_config"] = quantization_config
    if stale or quantization_config is not None:
        text = json.dumps(config, indent=2, ensure_ascii=text.isascii()) + "\n"
    (directory / "config.json").write_text(text, encoding="utf-8")


def in_file(model: Any, tensors: dict[str, Tensor], known: Collection[str]) -> dict[str, Tensor]:
    """Tensors of a model's state dict by the names, and in the pieces, that its files have.

    Args:
        model: loaded by transformers, which may rename, join and transpose what it reads.
        tensors: by their names in the model. Of what is joined in the file, all must be there.
        known: the names in the files.

    Returns:
        By their names in the files; those without a counterpart keep the model's name.
    """
    prefix = f"{model.base_model_prefix}."
    result = {}
    for name, tensor in _revert(model, tensors).items():
        variants = (name, name.removeprefix(prefix), prefix + name)
        result[next((v for v in variants if v in known), name)] = tensor
    return result


def place_of(model: Any, name: str, known: Collection[str]) -> str:
    """The name in the files of a tensor that they hold in one piece; see `in_file`."""
    (place,) = in_file(model, {name: _NOTHING}, known)
    return place


def _revert(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:  # transformers 4 renames only
        return {_old_name(model, name): tensor for name, tensor in tensors.items()}
    reverted: dict[str, Tensor] = revert_weight_conversion(model, tensors)
    return reverted


def _old_name(model: Any, name: str) -> str:
    for in_files, in_model in getattr(model, "_checkpoint_conversion_mapping", {}).items():
        plain = re.sub(r"\(.*\)", "", in_files.lstrip("^"))
        renamed, count = re.subn(in_model, plain, name)
        if count:
            return renamed
    return name
