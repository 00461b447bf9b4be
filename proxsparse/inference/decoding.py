"""Greedy decoding that a GPU can replay.

A decode step is a few hundred kernels of microseconds each; launched one by one, the host would be
what is measured. So every tensor of a step (tokens, position, cache) stays where it is, and the
step is recorded once as a CUDA graph. Models whose state cannot stay in place are left to
transformers, and the result says so.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterator, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from proxsparse.errors import ProxsparseError
from proxsparse.inference.attention import configs_to_regroup, regrouped
from proxsparse.models.positions import check_positions
from proxsparse.ops.cuda_graph import recording

_WARM_UP_STEPS = 3  # libraries pick kernels and allocate in their first calls
_STEPS_PER_CHECK = 16  # a look at the tokens makes the host wait for the GPU
_ARGMAX_WIDTH = 256  # logits of the first of two stages; divides most vocabularies


class NoStaticCache(ProxsparseError):
    """The model cannot decode in a cache of fixed size; the text says why."""


class Decoder:
    """Greedy decoding of a batch of prompts of one length, in a cache of fixed size.

    The most likely token is taken each time; nothing of the model's generation config applies. On
    CUDA a step is captured in a graph and replayed. The graph holds addresses of weights, which are
    not copied: make a new Decoder after layers were replaced or moved. A step of a model whose
    attention is "sdpa" repeats no keys and values; its config says so while the step runs (or is
    captured) and is as before when it has.

    Args:
        model: a Hugging Face causal LM on one device, in eval mode.
        batch_size: sequences, B.
        max_tokens: of a sequence, prompt and new ones, at least 2.
        compile: whether `torch.compile` fuses the small kernels of a step first, and sparse
            products of one input, see `compiler`; the prompt is read without.

    Attributes:
        tokens: int64 [B, max_tokens] on the device; the first `length` columns are filled.
        length: tokens of each sequence so far.
        mode: "cuda graph" or "static cache"; on CUDA the latter is followed by the reason.

    Cost: a few steps, to warm up; to compile a large model takes a minute. Memory for the cache
    and, in a graph, a step's activations.

    Raises:
        ProxsparseError: `max_tokens` is more than the model's positions.
        NoStaticCache: the model keeps a state that is no static cache, or fails with one.
    """

    def __init__(
        self, model: Any, batch_size: int, max_tokens: int, *, compile: bool = False
    ) -> None:
        # Before the cache: with a number too large its memory would be the first to fail.
        check_positions(model, max_tokens, f"max_tokens is {max_tokens}")
        self._model, self._cache = model, _make_cache(model, max_tokens)
        # A function, not a method, which would keep this object and its cache alive in a cycle.
        self._advance_by_one = _compile(_advance) if compile else _advance
        self._configs = configs_to_regroup(model)
        device = model.device
        self.tokens = torch.zeros(batch_size, max_tokens, dtype=torch.long, device=device)
        self.length = 0
        self._position = torch.zeros(1, dtype=torch.long, device=device)  # of the last token
        # Given whole, because some models make one themselves whose size they read from the device.
        self._attention_mask = torch.ones_like(self.tokens)
        self._accepted = frozenset(inspect.signature(model.forward).parameters)
        self._graph: torch.cuda.CUDAGraph | None = None
        self.mode = "static cache"
        try:
            self.prefill(self.tokens[:, : min(2, max_tokens - 1)])
            if self.length < max_tokens:
                self.step()
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            name = type(model).__name__
            raise NoStaticCache(f"{name} fails with a static cache: {error}") from error
        self.length = 0
        if device.type == "cuda":
            self._capture(device)

    @property
    def cache_bytes(self) -> int:
        """Bytes of the cache, all of which a step reads."""
        tensors = (x for layer in self._cache.layers for x in (layer.keys, layer.values))
        return sum(x.numel() * x.element_size() for x in tensors)

    @torch.no_grad()
    def prefill(self, input_ids: Tensor) -> None:
        """Start anew: read the prompts and append the first new token of each.

        Args:
            input_ids: int64 [B, L], fewer than `max_tokens` tokens each; no padding.

        Raises:
            ProxsparseError: another batch size, or prompts that are empty or leave no room.
        """
        batch_size, length = input_ids.shape
        if batch_size != len(self.tokens) or not 0 < length < self.tokens.shape[1]:
            raise ProxsparseError(
                f"input_ids are [{batch_size}, {length}]: this decoder takes {len(self.tokens)} "
                f"prompts of 1 to {self.tokens.shape[1] - 1} tokens"
            )
        self._reset()
        self.tokens[:, :length] = input_ids
        positions = torch.arange(length, device=self.tokens.device)
        self.tokens[:, length] = _predict(
            self._model, self._accepted, input_ids, positions, None, self._cache
        )
        self._position.fill_(length)
        self.length = length + 1

    @torch.no_grad()
    def step(self) -> None:
        """Append one token to each sequence; nothing waits for it on the host.

        Raises:
            ProxsparseError: there was no prefill, or `max_tokens` are there.
        """
        if not 0 < self.length < self.tokens.shape[1]:
            raise ProxsparseError(
                f"the sequences have {self.length} tokens: a step needs a prefill before it, and "
                f"room in max_tokens, {self.tokens.shape[1]}"
            )
        if self._graph is None:
            self._advance()
        else:
            self._graph.replay()
        self.length += 1

    def _reset(self) -> None:
        """Back to no tokens: what a cache's places hold is overwritten before it is read."""
        self._cache.reset()
        self._position.zero_()

    @torch.no_grad()
    def _advance(self) -> None:
        """`_advance` of this decoder's tensors, with the attention of a step."""
        with regrouped(self._configs):
            self._advance_by_one(
                self._model,
                self._accepted,
                self.tokens,
                self._position,
                self._attention_mask,
                self._cache,
            )

    def _capture(self, device: torch.device) -> None:
        """Records `_advance`, or notes in `mode` why that cannot be."""
        stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream(device))
        # The outer context also brings the stream back that a capture which fails leaves behind.
        with torch.cuda.device(device), torch.cuda.stream(stream):
            try:
                for _ in range(_WARM_UP_STEPS):
                    self._reset()
                    self._advance()
                self._reset()
                with _no_waiting():
                    self._advance()
                with recording(stream) as graph:
                    self._advance()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                reason, _, _ = str(error).partition("\n")
                self.mode = f"static cache: {reason}"
            else:
                self._graph, self.mode = graph, "cuda graph"
        torch.cuda.current_stream(device).wait_stream(stream)


def _compile(function: Callable[..., None]) -> Callable[..., None]:
    from proxsparse.inference.compiler import (
        compile_grouped,  # takes a second, which others need not spend
    )

    compiled: Callable[..., None] = torch.compile(function, backend=compile_grouped)
    return compiled


def _advance(
    model: Any, accepted: Set[str], tokens: Tensor, position: Tensor, mask: Tensor, cache: Any
) -> None:
    """Reads the token at `position` [1], writes the next one and moves on; all on the device.

    All of it is one function, so that compiled code also looks up and chooses the tokens.
    """
    last = tokens.index_select(1, position)
    following = _predict(model, accepted, last, position, mask, cache)
    position.add_(1)
    tokens.index_copy_(1, position, following[:, None])


def _predict(
    model: Any,
    accepted: Set[str],
    input_ids: Tensor,
    positions: Tensor,
    mask: Tensor | None,
    cache: Any,
) -> Tensor:
    """The most likely token [B] after input_ids [B, L] at positions [L].

    `accepted` are the names of the arguments that the model's forward takes.
    """
    arguments = {
        "position_ids": positions.expand(len(input_ids), -1),
        "cache_position": positions,  # until transformers 5 the cache does not count itself
        "logits_to_keep": 1,
    }
    output = model(
        input_ids=input_ids,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        **{name: value for name, value in arguments.items() if name in accepted},
    )
    logits: Tensor = output.logits[:, -1]
    return _argmax(logits)


def _argmax(logits: Tensor) -> Tensor:
    """The place [B] of the largest of logits [B, V], of equal ones the first.

    In two stages: PyTorch's argmax gives a row to one block of a GPU, which for a large vocabulary
    takes as long as a layer's product.
    """
    width = math.gcd(logits.shape[-1], _ARGMAX_WIDTH)
    values, places = logits.reshape(len(logits), -1, width).max(-1)
    part = values.argmax(-1, keepdim=True)
    return (part * width + places.gather(-1, part)).squeeze(-1)


@contextlib.contextmanager
def _no_waiting() -> Iterator[None]:
    """Raise RuntimeError where the host would wait for the GPU, which no graph can replay.

    Found here it is an error like any other; found during a capture it leaves PyTorch's allocator
    in a state that a later shortage of memory stumbles over.
    """
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that the mode is a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def _make_cache(model: Any, max_tokens: int) -> Any:
    """A static cache of one sequence length for all layers; raises NoStaticCache."""
    from transformers.cache_utils import StaticCache, StaticLayer, StaticSlidingWindowLayer

    name, attention = type(model).__name__, model.config._attn_implementation
    if getattr(model, "_is_stateful", False):
        raise NoStaticCache(f"{name} has a recurrent state")
    if not getattr(model, "_can_compile_fullgraph", False):
        raise NoStaticCache(f"{name} does not support a static cache")
    if attention not in ("sdpa", "eager"):
        raise NoStaticCache(f"{attention} attention would read the empty places of a static cache")
    try:
        cache: Any = StaticCache(config=model.config, max_cache_len=max_tokens)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise NoStaticCache(f"there is no static cache for {name}: {error!r}") from error
    for index, layer in enumerate(cache.layers):
        if type(layer) is StaticSlidingWindowLayer:
            # It counts on the host, which a graph cannot replay. The model masks what is outside
            # the window anyway, so a layer that keeps everything gives the same.
            cache.layers[index] = StaticLayer(max_cache_len=max_tokens)
        elif type(layer) is not StaticLayer:
            kind = type(layer).__name__
            raise NoStaticCache(f"{name} keeps a {kind}, which is more than a cache")
    return cache


@dataclass(frozen=True)
class Decoded:
    """What greedy decoding gave, and how long it took.

    Attributes:
        tokens: of each sequence the new ones, up to the first end token, which is kept.
        decoding: "cuda graph"; "static cache", on CUDA with the reason why there is no graph; or
            "transformers" with the reason why there is no static cache.
        prefill_seconds: from the prompt to the first new token.
        decode_seconds: of all steps after it.
        num_steps: how many these were; on a GPU a few may have run past the end.
    """

    tokens: list[list[int]]
    decoding: str
    prefill_seconds: float
    decode_seconds: float
    num_steps: int


def decode_greedily(
    model: Any, input_ids: Tensor, max_new_tokens: int, *, compile: bool = False
) -> Decoded:
    """Continue prompts of one length with the most likely tokens, after a warm-up.

    Args:
        model: a Hugging Face causal LM on one device, in eval mode. Its generation config says
            which tokens end a sequence; where transformers decodes, the rest of it applies too.
        input_ids: int64 [B, L] on the model's device, no padding.
        max_new_tokens: of each sequence, at least 1.
        compile: see `Decoder`.
    """
    ends = model.generation_config.eos_token_id
    ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
    batch_size, length = input_ids.shape
    try:
        decoder = Decoder(model, batch_size, length + max_new_tokens, compile=compile)
    except NoStaticCache as error:
        return _decode_with_transformers(model, input_ids, max_new_tokens, ends, str(error))
    decoder.prefill(input_ids)
    _wait_for(model.device)
    began = time.perf_counter()
    decoder.prefill(input_ids)
    _wait_for(model.device)
    prefilled = time.perf_counter()
    steps_per_check = _STEPS_PER_CHECK if input_ids.is_cuda else 1
    end_tokens = torch.tensor(ends, dtype=torch.long, device=input_ids.device)
    num_steps = 0
    while num_steps < max_new_tokens - 1:
        if ends and num_steps % steps_per_check == 0:
            new = decoder.tokens[:, length : decoder.length]
            if torch.isin(new, end_tokens).any(-1).all():
                break
        decoder.step()
        num_steps += 1
    _wait_for(model.device)
    decode_seconds = time.perf_counter() - prefilled
    tokens = decoder.tokens[:, length : decoder.length].tolist()
    return Decoded(
        [_until_end(row, ends) for row in tokens],
        decoder.mode,
        prefilled - began,
        decode_seconds,
        num_steps,
    )


class _Clock:
    """A streamer, which transformers calls with the prompt and then with each new token."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _: Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


def _decode_with_transformers(
    model: Any, input_ids: Tensor, max_new_tokens: int, ends: list[int], reason: str
) -> Decoded:
    mask, clock = torch.ones_like(input_ids), _Clock()
    model.generate(input_ids, attention_mask=mask, max_new_tokens=1, do_sample=False)
    _wait_for(model.device)
    began = time.perf_counter()
    output = model.generate(
        input_ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        streamer=clock,
    )
    first, last = clock.times[1], clock.times[-1]
    tokens = output[:, input_ids.shape[1] :].tolist()
    return Decoded(
        [_until_end(row, ends) for row in tokens],
        f"transformers: {reason}",
        first - began,
        last - first,
        len(tokens[0]) - 1,
    )


def _until_end(tokens: list[int], ends: list[int]) -> list[int]:
    stop = next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[:stop]


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
