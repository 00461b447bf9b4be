"""Perplexity by plain transformers code that shares nothing with the product.

Protocol: tokenise the whole text without special tokens, cut it into blocks, and average the
negative log-likelihood of every token of a block but its first. Where the tokenizer begins a text
with <bos>, each block is preceded by it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


def tokenize(path: Path, tokenizer: Any) -> Tensor:
    """The tokens of a text file, int64 [T]."""
    text = path.read_text(encoding="utf-8")
    encoded = tokenizer(text, add_special_tokens=False, return_tensors="pt", verbose=False)
    ids: Tensor = encoded.input_ids[0]
    return ids


@torch.no_grad()
def perplexity(model: Any, tokenizer: Any, tokens: Tensor, length: int) -> float:
    """Of tokens [T] in blocks of `length`; a float32 model on a GPU computes in bfloat16."""
    blocks = tokens[: len(tokens) // length * length].view(-1, length)
    bos = tokenizer.bos_token_id
    begins_with_bos = bos is not None and tokenizer("a").input_ids[0] == bos
    device = next(model.parameters()).device
    total = 0.0
    for batch in blocks.to(device).split(max(1, 8192 // length)):
        ids = torch.nn.functional.pad(batch, (1, 0), value=bos) if begins_with_bos else batch
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits = model(input_ids=ids, use_cache=False).logits
        log_p = logits[:, -length:-1].float().log_softmax(-1)
        total -= log_p.gather(-1, batch[:, 1:, None]).sum(dtype=torch.float64).item()
    return math.exp(total / (len(blocks) * (length - 1)))
