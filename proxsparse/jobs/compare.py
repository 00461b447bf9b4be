"""The job behind `eval`: models from disk or the Hub, on a text and on lm-eval's tasks."""

from __future__ import annotations

import contextlib
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from proxsparse.config import EvalConfig
from proxsparse.data.sources import read_documents
from proxsparse.data.tokenizing import added_prefix, tokenize_documents, tokenize_text
from proxsparse.errors import ProxsparseError
from proxsparse.jobs.evaluate import bounded_exp, evaluate_perplexity, rolling_log_likelihood
from proxsparse.models.loading import LoadedModel, build_model, load_model, resolve_device
from proxsparse.models.positions import check_positions, num_positions

_STREAM_TOKENS = 256 * 2048  # of a dataset without an end, such as C4: as many as papers take
_CHARACTERS_PER_TOKEN = 8  # more than any text has on average; a stream is read so far


def evaluate_models(
    models: Sequence[str | os.PathLike[str]], config: EvalConfig | None = None
) -> dict[str, dict[str, Any]]:
    """Perplexity and task results of models on disk or on the Hub, on the same text.

    Args:
        models: directories or Hub names.
        config: text, tasks and how; default WikiText-2's test split in blocks of at most 2,048.

    Returns:
        Model -> {"perplexity", "tokens": text tokens read, "prefix": tokens put before each block,
        "source": the text, "max_seq_length"} unless only tasks were asked for, and {"tasks"} when
        tasks were. With `rolling` perplexity is of a token, and {"word_perplexity",
        "byte_perplexity", "bits_per_byte"} are lm-eval's figures.

    Raises:
        ProxsparseError: no or unreadable text, unknown tasks, a model that cannot be loaded.
    """
    config = EvalConfig() if config is None else config
    if isinstance(models, str | os.PathLike) or not models:
        raise ProxsparseError(f"models is {models!r}: give a list with at least one model")
    device = resolve_device(config.device)
    has_text = config.data is not None or not config.tasks
    lengths = {}
    for model in models:  # known from the config, before weights are read
        skeleton = build_model(model, torch.device("meta"))
        length = config.max_seq_length or min(num_positions(skeleton) or 2048, 2048)
        check_positions(skeleton, length, f"--max-seq-length is {length}")
        lengths[str(model)] = length
    # One length for all: perplexities of other lengths cannot be compared.
    length = min(lengths.values())
    run_tasks = _open_tasks(config) if config.tasks else None
    read, source = _text(config)
    results: dict[str, dict[str, Any]] = {}
    for model in models:
        loaded = load_model(model, device)
        result: dict[str, Any] = {}
        if has_text:
            score = _score_rolling if config.rolling else _score_blocks
            result |= score(loaded, read(loaded.tokenizer), length, config.batch_size)
            result |= {"source": source, "max_seq_length": length}
        if run_tasks is not None:
            result["tasks"] = run_tasks(loaded)
        results[str(model)] = result
        del loaded
    return results


def _text(config: EvalConfig) -> tuple[Callable[[Any], list[str]], str]:
    """What gives the documents of the text to a tokenizer, and the name of the text."""
    name = config.data or "wikitext2"
    if name == "self":
        raise ProxsparseError(
            "--data self cannot be evaluated on: a text that the model wrote says nothing about "
            "it; give another text"
        )
    if name == "stdlib":
        from proxsparse.data.corpus import stdlib_texts

        text = "\n".join(content for _, content in stdlib_texts("heldout"))
        return lambda _: [text], "held-out modules of Python's library"
    opened: dict[str, Any] = {}

    def read(tokenizer: Any) -> list[str]:
        key = repr(getattr(tokenizer, "chat_template", None))
        if key not in opened:
            opened[key] = read_documents(
                name,
                tokenizer,
                config.text_column,
                split=config.split or _SPLITS.get(name),
                most_characters=_STREAM_TOKENS * _CHARACTERS_PER_TOKEN,
            )
        return list(opened[key])

    return read, name


_SPLITS = {"wikitext2": "test", "c4": "validation"}  # those that papers report


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
        "perplexity": bounded_exp(total / num_tokens),
        "word_perplexity": bounded_exp(total / num_words),
        "byte_perplexity": bounded_exp(total / num_bytes),
        "bits_per_byte": total / num_bytes / math.log(2),
        "tokens": num_tokens,
        "prefix": tokenizer.convert_ids_to_tokens(prefix),
    }


def _open_tasks(config: EvalConfig) -> Callable[[LoadedModel], dict[str, Any]]:
    """What runs the tasks on a model, once lm-eval knows all of them.

    Raises:
        ProxsparseError: lm-eval is not installed, or does not know a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ProxsparseError(
            f"--tasks needs lm-eval: pip install 'proxsparse[eval]' ({error})"
        ) from error
    manager = TaskManager(include_path=config.include_path)
    known = list(manager.all_tasks)
    unknown = [task for task in config.tasks if not manager.match_tasks([task])]
    if unknown:
        import difflib

        close = difflib.get_close_matches(unknown[0], known, n=3)
        hint = f"did you mean {', '.join(close)}?" if close else "lm-eval ls tasks lists them"
        where = f" and {config.include_path}" if config.include_path else ""
        raise ProxsparseError(f"lm-eval{where} has no task {unknown[0]!r}: {hint}")

    def run(loaded: LoadedModel) -> dict[str, Any]:
        with _explaining_tasks(config.tasks):
            found = simple_evaluate(
                model=HFLM(
                    pretrained=loaded.model,
                    tokenizer=loaded.tokenizer,
                    batch_size=config.batch_size,
                ),
                tasks=list(config.tasks),
                num_fewshot=config.num_fewshot,
                limit=config.limit,
                task_manager=manager,
            )
        results: Mapping[str, Any] = found["results"]
        return {task: dict(figures) for task, figures in results.items()}

    return run


@contextlib.contextmanager
def _explaining_tasks(tasks: Sequence[str]) -> Iterator[None]:
    """Turn what a download or a task's own code raises into one error."""
    try:
        yield
    except ProxsparseError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ProxsparseError(
            f"lm-eval could not run {', '.join(tasks)} ({type(error).__name__}: {reason}): its "
            "data come from the Hugging Face Hub, so check the network, or run once where there "
            "is one and take the cache along; --include-path reads tasks of your own"
        ) from error
