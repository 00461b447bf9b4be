"""Perplexity, the figure every table of the field is in, and lm-eval's tasks for the rest.

The protocol is the usual one: tokenise the whole text, cut it into blocks, and average the negative
log-likelihood of every token of a block but its first. What the tokenizer puts before every text
(mostly BOS) begins each block: a model that has always seen it is lost without. The other protocol
is lm-eval's rolling one, which scores every token once and gives the prefix to the first block
only.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from proxsparse.data.tokenizing import (
    added_prefix,
    to_blocks,
    tokenize_documents,
    tokenize_text,
    with_prefix,
)
from proxsparse.errors import ProxsparseError
from proxsparse.models.loading import LoadedModel
from proxsparse.models.positions import check_positions
from proxsparse.models.precision import autocast, eval_mode


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
    return _exp(total / (blocks.shape[0] * (blocks.shape[1] - first)))


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
        bar = tqdm(pairs, "perplexity", num_batches, disable=None, leave=False)
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


def _exp(x: float) -> float:
    return math.exp(min(x, 700.0))


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
    rolling: bool = False,
    text_column: str | None = None,
) -> dict[str, Any]:
    """Perplexity and task results of a model on disk or on the Hub.

    Args:
        model: directory or Hub name.
        data: a file or folder as for calibration, "stdlib" for the held-out modules of Python's
            library, or None.
        tasks: names of lm-eval tasks.
        max_seq_length: tokens per block.
        batch_size: blocks per forward pass.
        device: "auto" or a torch device.
        rolling: whether to score as lm-eval does, see `rolling_log_likelihood`.
        text_column: column that holds the text of a table.

    Returns:
        {"perplexity", "tokens": text tokens read, "prefix": tokens put before each block} when data
        was given, {"tasks"} when tasks were. With `rolling` perplexity is of a token, and
        {"word_perplexity", "byte_perplexity", "bits_per_byte"} are lm-eval's figures.

    Raises:
        ProxsparseError: neither data nor tasks, or unreadable ones.
    """
    from proxsparse.models.loading import build_model, load_model, resolve_device

    if data is None and not tasks:
        raise ProxsparseError(
            "nothing to evaluate: give --data FILE, --data stdlib or --tasks NAME"
        )
    where = resolve_device(device)
    if data is not None:  # known from the config, before weights are read
        skeleton = build_model(model, torch.device("meta"))
        check_positions(skeleton, max_seq_length, f"--max-seq-length is {max_seq_length}")
    loaded = load_model(model, where)
    result: dict[str, Any] = {}
    if data is not None:
        texts = _read(data, loaded.tokenizer, text_column)
        score = _score_rolling if rolling else _score_blocks
        result |= score(loaded, texts, max_seq_length, batch_size)
    if tasks:
        result["tasks"] = evaluate_tasks(loaded.model, loaded.tokenizer, tasks)
    return result


def _read(data: str, tokenizer: Any, text_column: str | None) -> list[str]:
    """The documents of a file or folder; of the standard library one."""
    from proxsparse.data.corpus import stdlib_texts
    from proxsparse.data.sources import read_documents

    if data == "stdlib":
        return ["\n".join(content for _, content in stdlib_texts("heldout"))]
    return read_documents(data, tokenizer, text_column)


def _score_blocks(
    loaded: LoadedModel, texts: list[str], max_seq_length: int, batch_size: int
) -> dict[str, Any]:
    tokenizer = loaded.tokenizer
    tokens = torch.cat(list(tokenize_documents(texts, tokenizer, tokenizer.eos_token_id)))
    perplexity = evaluate_perplexity(
        loaded.model, tokens, tokenizer, max_seq_length=max_seq_length, batch_size=batch_size
    )
    prefix = added_prefix(tokenizer)
    room = max_seq_length - len(prefix)
    return {
        "perplexity": perplexity,
        "tokens": tokens.numel() // room * room,
        "prefix": tokenizer.convert_ids_to_tokens(prefix),
    }


def _score_rolling(
    loaded: LoadedModel, texts: list[str], max_seq_length: int, batch_size: int
) -> dict[str, Any]:
    tokenizer = loaded.tokenizer
    total, num_tokens = 0.0, 0
    prefix = added_prefix(tokenizer)
    for text in texts:
        tokens = tokenize_text(text, tokenizer)
        num_tokens += len(prefix) + tokens.numel()
        total -= rolling_log_likelihood(
            loaded.model, tokens, tokenizer, max_seq_length=max_seq_length, batch_size=batch_size
        )
    num_words = sum(len(re.split(r"\s+", text)) for text in texts)
    num_bytes = sum(len(text.encode()) for text in texts)
    return {
        "perplexity": _exp(total / num_tokens),
        "word_perplexity": _exp(total / num_words),
        "byte_perplexity": _exp(total / num_bytes),
        "bits_per_byte": total / num_bytes / math.log(2),
        "tokens": num_tokens,
        "prefix": tokenizer.convert_ids_to_tokens(prefix),
    }
