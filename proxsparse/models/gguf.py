"""GGUF files, which other programs quantise models into: read as the dense model they stand for.

transformers does the work for the architectures it knows. What comes out is no longer the file's:
a pruned result is an ordinary checkpoint in bfloat16, and its report names the file's types.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from proxsparse.errors import ProxsparseError
from proxsparse.models.files import find_gguf


def gguf_arguments(name: str) -> tuple[str, dict[str, Any]]:
    """What `from_pretrained` has to be given for a model: its folder, and the file in it, if any.

    Args:
        name: from `files.model_name`.

    Raises:
        ProxsparseError: it is a GGUF file, and the package that reads them is not installed.
    """
    file = find_gguf(Path(name))
    if file is None:
        return name, {}
    try:
        import gguf  # noqa: F401
    except ImportError as error:
        raise ProxsparseError(
            f"{file} is a GGUF file, which the package gguf reads: pip install gguf"
        ) from error
    return str(file.parent), {"gguf_file": file.name}


def quantised_types(name: str) -> str | None:
    """The types of a GGUF file's matrices, such as "Q4_1, Q6_K"; None for another model."""
    file = find_gguf(Path(name))
    if file is None:
        return None
    from gguf import GGUFReader

    tensors = GGUFReader(str(file)).tensors
    return ", ".join(sorted({t.tensor_type.name for t in tensors if len(t.shape) > 1}))


def dequantising() -> dict[str, Any]:
    """What tells `from_pretrained` to make a dense model; a newer one may keep blocks packed."""
    import transformers

    config = getattr(transformers, "GgufConfig", None)
    return {} if config is None else {"quantization_config": config(dequantize=True)}
