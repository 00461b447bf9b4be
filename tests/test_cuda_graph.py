"""Recording a graph that fails: which error is shown, and that order is made."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from proxsparse.ops import cuda_graph


@pytest.fixture
def tidied(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Pools that were tidied up; `torch.cuda.graph` fails at its end if its block does."""

    @contextlib.contextmanager
    def graph(_: Any, pool: Any, stream: Any) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if "alone" in str(error):
                raise
            raise RuntimeError("the capture was invalidated") from None

    pools: list[Any] = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: "graph")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(cuda_graph, "_tidy_up", lambda stream, pool: pools.append(pool))
    return pools


STREAM: Any = SimpleNamespace()


def test_what_is_recorded_comes_out_as_it_went_in(tidied: list[Any]) -> None:
    with cuda_graph.recording(STREAM) as graph:
        assert graph == "graph"
    assert not tidied


@pytest.mark.parametrize("kind", [RuntimeError, torch.OutOfMemoryError])
@pytest.mark.parametrize("message", ["the host waits", "alone"])
def test_the_first_error_is_the_one_that_is_shown(
    kind: type[RuntimeError], message: str, tidied: list[Any]
) -> None:
    with pytest.raises(kind, match=message), cuda_graph.recording(STREAM):
        raise kind(message)
    assert tidied == ["pool"]


def test_other_errors_pass(tidied: list[Any]) -> None:
    with pytest.raises(KeyError), cuda_graph.recording(STREAM):
        raise KeyError
    assert not tidied
