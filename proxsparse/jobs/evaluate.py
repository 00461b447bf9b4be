"""Perplexity, the figure every table of the field is in, and lm-eval's tasks for the rest.

The protocol is the usual one: tokenise the whole text without special tokens, cut it into blocks,
and average the negative log-likelihood of every token of a block but its first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from proxsparse.data.tokenizing import to_blocks, tokenize_text
from proxsparse.errors import ProxsparseError
from proxsparse.learning.loss import next_token_loss
from proxsparse.models.precision import eval_mode


@torch.no_grad()
def evaluate_perplexity(
    model: nn.Module,
    data: str | Tensor,
    tokenizer: Any = None,
    *,
    max_seq_length: int = 512,
    batch_size: int = 8,
) -> float:
    """The exponential of the mean negative log-likelihood of the tokens 2..L of each block.

    Args:
        model: a Hugging Face causal LM, on its device, in its dtype (a float32 model on a GPU is
            evaluated under bfloat16 autocast).
        data: the text itself, or its tokens: int64 [T], or [S, L] already in blocks.
        tokenizer: needed when `data` is text.
        max_seq_length: block length L; what remains at the end is dropped.
        batch_size: blocks per forward pass; changes speed and memory, not the result.

    Raises:
        ProxsparseError: text without a tokenizer, fewer than `max_seq_length` tokens, or a model
            whose loss is NaN or infinite.
    """
    if isinstance(data, str):
        if tokenizer is None:
            raise ProxsparseError("to evaluate on text, pass the model's tokenizer as well")
        data = tokenize_text(data, tokenizer)
    blocks = data if data.dim() == 2 else to_blocks(data, max_seq_length)
    if blocks.shape[0] == 0:
        raise ProxsparseError(
            f"the text has {data.numel()} tokens, fewer than one block of {max_seq_length}: "
            "give more text or a smaller --max-seq-length"
        )
    device = next(model.parameters()).device
    total = 0.0
    with eval_mode(model):
        batches = torch.split(blocks, batch_size)
        for i, batch in enumerate(tqdm(batches, desc="perplexity", disable=None, leave=False)):
            loss = next_token_loss(model, batch.to(device), "sum").item()
            if not math.isfinite(loss):
                raise ProxsparseError(
                    f"the loss of {type(model).__name__} is {loss} on blocks {i * batch_size} and "
                    "after, so it has no perplexity: its weights are damaged, or it overflows in "
                    "its dtype; load a sound checkpoint, or one in float32"
                )
            total += loss
    return math.exp(min(total / (blocks.shape[0] * (blocks.shape[1] - 1)), 700.0))


def evaluate_tasks(model: nn.Module, tokenizer: Any, tasks: Sequence[str]) -> dict[str, Any]:
    """Zero-shot results of lm-eval's tasks, as lm-eval names them.

    Raises:
        ProxsparseError: lm-eval is not installed.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
    except ImportError as error:
        raise ProxsparseError(
            f"--tasks needs lm-eval: pip install 'proxsparse[eval]' ({error})"
        ) from error
    results = simple_evaluate(model=HFLM(pretrained=model, tokenizer=tokenizer), tasks=list(tasks))
    return dict(results["results"])


def remaining_loss(perplexity: float, dense: float, wanda: float) -> float:
    """The share of Wanda's loss in log-perplexity that remains; 0 is as good as dense."""
    return math.log(perplexity / dense) / math.log(wanda / dense)


def evaluate_model(
    model: str,
    data: str | None,
    tasks: Sequence[str],
    *,
    max_seq_length: int = 512,
    batch_size: int = 8,
    device: str = "auto",
) -> dict[str, Any]:
    """Perplexity and task results of a model on disk or on the Hub.

    Args:
        model: directory or Hub name.
        data: a text file, "stdlib" for the held-out modules of Python's library, or None.
        tasks: names of lm-eval tasks.
        max_seq_length: tokens per block.
        batch_size: blocks per forward pass.
        device: "auto" or a torch device.

    Returns:
        {"perplexity", "tokens"} when data was given, {"tasks"} when tasks were.

    Raises:
        ProxsparseError: neither data nor tasks, or unreadable ones.
    """
    from proxsparse.data.corpus import stdlib_texts
    from proxsparse.data.sources import read_text
    from proxsparse.models.loading import load_model, resolve_device

    if data is None and not tasks:
        raise ProxsparseError(
            "nothing to evaluate: give --data FILE, --data stdlib or --tasks NAME"
        )
    loaded = load_model(model, resolve_device(device))
    result: dict[str, Any] = {}
    if data is not None:
        if data == "stdlib":
            text = "\n".join(content for _, content in stdlib_texts("heldout"))
        else:
            text = read_text(data)
        tokens = tokenize_text(text, loaded.tokenizer)
        result["perplexity"] = evaluate_perplexity(
            loaded.model, tokens, max_seq_length=max_seq_length, batch_size=batch_size
        )
        result["tokens"] = tokens.numel() // max_seq_length * max_seq_length
    if tasks:
        result["tasks"] = evaluate_tasks(loaded.model, loaded.tokenizer, tasks)
    return result
