"""Perplexity, the figure every table of the field is in, and lm-eval's tasks for the rest.

The protocol is the usual one: tokenise the whole text, cut it into blocks, and average the negative
log-likelihood of every token of a block but its first. What the tokenizer puts before every text
(mostly BOS) begins each block: a model that has always seen it is lost without. The other protocol
is lm-eval's rolling one, which scores every token once and gives the prefix to the first block
only.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from proxsparse.data.tokenizing import added_prefix, to_blocks, tokenize_text, with_prefix
from proxsparse.errors import ProxsparseError
from proxsparse.models.positions import check_positions
from proxsparse.models.precision import autocast, eval_mode
from proxsparse.progress import progress


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

    With a tokenizer, what it puts before every text begins each block and counts within L; only the
    tokens of the text are scored.

    Args:
        model: a Hugging Face causal LM, on its device, in its dtype (a float32 model on a GPU is
            evaluated under bfloat16 autocast).
        data: the text itself, or its tokens: int64 [T], or [S, L] already in blocks, which are
            taken as they are.
        tokenizer: needed when `data` is text.
        max_seq_length: block length L; what remains at the end is dropped.
        batch_size: blocks per forward pass; changes speed and memory, not the result.

    Raises:
        ProxsparseError: text without a tokenizer, fewer than `max_seq_length` tokens, blocks
            longer than the model's positions, or a model whose loss is NaN or infinite.
    """
    if isinstance(data, str):
        data = _tokenize(data, tokenizer)
    prefix = added_prefix(tokenizer) if data.dim() == 1 else []
    length = max_seq_length if data.dim() == 1 else data.shape[1]
    check_positions(model, length, f"--max-seq-length is {length}")
    blocks = data if data.dim() == 2 else with_prefix(data, prefix, length)
    if blocks.shape[0] == 0:
        raise ProxsparseError(
            f"the text has {data.numel()} tokens, fewer than one block of {max_seq_length}: "
            "give more text or a smaller --max-seq-length"
        )
    first = max(1, len(prefix))
    total = _sum_losses(model, blocks, blocks[:, first:], first - 1, batch_size)
    return bounded_exp(total / (blocks.shape[0] * (blocks.shape[1] - first)))


@torch.no_grad()
def rolling_log_likelihood(
    model: nn.Module,
    data: str | Tensor,
    tokenizer: Any,
    *,
    max_seq_length: int = 512,
    batch_size: int = 8,
) -> float:
    """The log-likelihood of a whole text in nats, as lm-eval's rolling requests have it.

    Every token is scored once. A window reads L tokens and scores their successors; the first
    begins with BOS (with the end-of-text token where there is no BOS), any other with the last
    token of the one before, and the last goes back so far that it also reads L. A tokenizer that
    adds a prefix adds it to the text, where it is scored like the text.

    Args:
        model: as for `evaluate_perplexity`.
        data: the text, or its tokens int64 [T] without special tokens.
        tokenizer: the model's.
        max_seq_length: L; lm-eval takes the model's positions.
        batch_size: windows per forward pass.

    Raises:
        ProxsparseError: no tokens, windows longer than the model's positions, or a tokenizer with
            neither BOS nor end-of-text token.
    """
    check_positions(model, max_seq_length, f"--max-seq-length is {max_seq_length}")
    tokens = _tokenize(data, tokenizer) if isinstance(data, str) else data
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    start = eos if bos is None else bos
    if start is None or tokens.numel() == 0:
        what = "the text has no tokens" if start is not None else "the tokenizer has no BOS or EOS"
        raise ProxsparseError(f"{what}: a rolling log-likelihood needs both; leave --rolling out")
    before = torch.tensor([start, *added_prefix(tokenizer)], dtype=torch.int64)
    tokens = torch.cat((before, tokens))
    count = tokens.numel() - 1  # tokens to score
    whole = count // max_seq_length * max_seq_length
    inputs, targets = (to_blocks(tokens[i : whole + i], max_seq_length) for i in (0, 1))
    total = _sum_losses(model, inputs, targets, 0, batch_size)
    if whole < count:
        begin = max(0, count - max_seq_length)
        last, rest = tokens[None, begin:count], tokens[None, whole + 1 :]
        total += _sum_losses(model, last, rest, whole - begin, batch_size)
    return -total


def _tokenize(text: str, tokenizer: Any) -> Tensor:
    if tokenizer is None:
        raise ProxsparseError("to evaluate on text, pass the model's tokenizer as well")
    return tokenize_text(text, tokenizer)


def _sum_losses(
    model: nn.Module, inputs: Tensor, targets: Tensor, first: int, batch_size: int
) -> float:
    """Negative log-likelihood of targets [S, n], which inputs [S, L] predict from `first` on."""
    device = next(model.parameters()).device
    pairs = zip(torch.split(inputs, batch_size), torch.split(targets, batch_size), strict=True)
    num_batches = -(-len(inputs) // batch_size)
    total = 0.0
    with eval_mode(model):
        bar = progress(pairs, "perplexity", "batch", total=num_batches)
        for i, (x, y) in enumerate(bar):
            if y.numel() == 0:  # PyTorch splits nothing into one empty part
                continue
            with autocast(model):
                logits = model(input_ids=x.to(device), use_cache=False).logits
            logits = logits[:, first : first + y.shape[1]].float().flatten(0, 1)
            loss = nn.functional.cross_entropy(logits, y.to(device).flatten(), reduction="sum")
            if not math.isfinite(loss.item()):
                raise ProxsparseError(
                    f"the loss of {type(model).__name__} is {loss.item()} in batch {i}, so it has "
                    "no perplexity: its weights are damaged, or it overflows in its dtype; load a "
                    "sound checkpoint, or one in float32"
                )
            total += loss.item()
    return total


def bounded_exp(x: float) -> float:
    """The exponential of x, finite also where a ruined model makes x huge."""
    return math.exp(min(x, 700.0))


def remaining_loss(perplexity: float, dense: float, wanda: float) -> float:
    """The share of Wanda's loss in log-perplexity that remains; 0 is as good as dense."""
    return math.log(perplexity / dense) / math.log(wanda / dense)
