"""Files of strangers, mutated: only a ProxsparseError may come out, soon, and in little memory.

The examples are the same in every run; `-m slow` tries 20 times as many, anew each time.
"""

from __future__ import annotations

import copy
import json
import resource
import shutil
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

import proxsparse
from proxsparse.errors import ProxsparseError
from proxsparse.jobs.inspect import inspect_model
from proxsparse.jobs.pack import pack, unpack
from proxsparse.jobs.prune import apply, prune
from proxsparse.learning.checkpoint import Checkpoints
from proxsparse.models.forms import read_report
from proxsparse.models.loading import build_model, load_model
from proxsparse.models.masks import Masks, targets_of

_GB = 2**30
JUNK: list[Any] = [
    *(
        None,
        True,
        False,
        0,
        -1,
        1,
        3,
        7,
        2**31,
        2**63,
        2**200,
        0.5,
        -0.0,
        float("nan"),
        float("inf"),
    ),
    *("", "x", "4", "re:(a+)+$", "re:(", "../../etc/passwd", "[/x]", "\0", "\ud800", "a" * 10_000),
    *([], {}, [[]], [None], [-1, 4], [2**40, 2**40, 4], {"a": {}}, ["x"] * 3, {"": 0}),
]


@st.composite
def mutated(draw: st.DrawFn, document: Any) -> Any:
    """The document with one to three of its values replaced, removed, doubled or added to."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(document))
        holder, key = draw(st.sampled_from(places))
        match draw(st.sampled_from(["replace", "replace", "remove", "nest", "add"])):
            case "replace":
                holder[key] = copy.deepcopy(draw(st.sampled_from(JUNK)))
            case "remove":
                del holder[key]
            case "nest":
                holder[key] = [holder[key]]
            case "add" if isinstance(holder, dict):
                holder[draw(st.sampled_from(["x", "", "re:.*", "auto_map"]))] = holder[key]
        if not document:
            break
    return document


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, x in list(items):
        yield value, key
        if isinstance(x, dict | list):
            yield from _places(x)


@st.composite
def damaged(draw: st.DrawFn, whole: bytes) -> bytes:
    """The bytes cut short, or with some of them overwritten, mostly near the start."""
    if draw(st.booleans()):
        return whole[: draw(st.integers(0, len(whole) - 1))]
    data = bytearray(whole)
    for _ in range(draw(st.integers(1, 4))):
        end = draw(st.sampled_from([16, min(400, len(data)), len(data)]))
        data[draw(st.integers(0, end - 1))] = draw(st.integers(0, 255))
    return bytes(data)


@pytest.fixture(autouse=True)
def _bounded_memory() -> Iterator[None]:
    before = resource.getrlimit(resource.RLIMIT_AS)
    size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size + 4 * _GB, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def attempt(action: Callable[[], Any]) -> None:
    """Run it; a ProxsparseError of one line is as good as success."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        action()
    except ProxsparseError as error:
        assert str(error)
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak) * 1024
    assert grown < _GB, f"{grown / _GB:.1f} GB"


def fuzz(strategy: Any, check: Callable[[Any], None], examples: int, more: bool) -> None:
    """Try `check` on that many values of the strategy."""
    quiet = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]
    options = settings(
        max_examples=examples * (20 if more else 1),
        derandomize=not more,
        database=None,
        deadline=timedelta(seconds=10),
        suppress_health_check=quiet,
    )
    options(given(strategy)(check))()


@pytest.fixture(params=[False, pytest.param(True, marks=[pytest.mark.slow])], ids=["few", "many"])
def more(request: Any) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def base(tmp_path_factory: Any) -> Path:
    """A tiny Llama with the demo's tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    directory: Path = tmp_path_factory.mktemp("fuzz") / "base"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).save_pretrained(directory)
    demo = Path(proxsparse.__file__).parent / "demo_model"
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / name, directory)
    return directory


@pytest.fixture(scope="module")
def pruned(base: Path) -> Path:
    prune(base, base.with_name("pruned"), method="magnitude")
    return base.with_name("pruned")


@pytest.fixture(scope="module")
def packed(pruned: Path) -> Path:
    pack(pruned, pruned.with_name("packed"))
    return pruned.with_name("packed")


@pytest.fixture
def copied(tmp_path: Path) -> Callable[[Path], Path]:
    def copy_of(directory: Path) -> Path:
        shutil.copytree(directory, tmp_path / "copy")
        return tmp_path / "copy"

    return copy_of


def write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


def test_config(base: Path, copied: Any, more: bool) -> None:
    directory = copied(base)
    path = directory / "config.json"

    def check(value: Any) -> None:
        write_json(path, value)
        attempt(lambda: build_model(directory, torch.device("meta")))
        attempt(lambda: load_model(directory, torch.device("cpu")))

    fuzz(mutated(json.loads(path.read_text())), check, 60, more)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("num_hidden_layers", 10**9),
        ("hidden_size", 2**62),
        ("vocab_size", 2**50),
        ("num_attention_heads", 0),
        ("hidden_size", "16"),
        ("model_type", ["llama"]),
        ("rope_parameters", 3),
    ],
)
def test_configs_that_once_ran_on_or_fell_over(
    base: Path, copied: Any, key: str, value: Any
) -> None:
    directory = copied(base)
    config = json.loads((directory / "config.json").read_text())
    write_json(directory / "config.json", {**config, key: value})
    with pytest.raises(ProxsparseError):
        load_model(directory, torch.device("cpu"))


def test_report(pruned: Path, copied: Any, more: bool) -> None:
    directory = copied(pruned)
    path = directory / "proxsparse.json"

    def check(value: Any) -> None:
        write_json(path, value)
        attempt(lambda: read_report(directory))

    fuzz(mutated(json.loads(path.read_text())), check, 100, more)


@pytest.mark.parametrize(
    "text", ["", "[]", "3", "{", '{"format": 1}', '{"format": "x", "layers": [3]}', "[" * 100_000]
)
@pytest.mark.parametrize("command", [inspect_model, lambda d: pack(d, d.with_name("out"))])
def test_reports_of_the_wrong_form_stop_the_commands(
    pruned: Path, copied: Any, text: str, command: Any
) -> None:
    directory = copied(pruned)
    (directory / "proxsparse.json").write_text(text)
    with pytest.raises(ProxsparseError, match=r"proxsparse.json"):
        command(directory)


def header(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    with safe_open(str(path), framework="pt") as file:
        return dict(file.metadata()), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def test_mask_header(base: Path, pruned: Path, tmp_path: Path, more: bool) -> None:
    model = load_model(base, torch.device("cpu")).model
    metadata, codes = header(pruned / "proxsparse.masks")
    inner = {"shapes", "recipe", "weights_updated"}
    document = {k: json.loads(v) if k in inner else v for k, v in metadata.items()}
    path = tmp_path / "m.safetensors"

    def check(value: Any) -> None:
        texts = {
            k: v if isinstance(v, str) else json.dumps(v)
            for k, v in value.items()
            if not (isinstance(v, str) and "\ud800" in v)
        }
        safetensors.torch.save_file(codes, path, metadata=texts)
        attempt(lambda: targets_of(model, Masks.load(path)))

    fuzz(mutated(document), check, 100, more)


@pytest.mark.parametrize("name", ["re:(.*)*(.*)*(.*)*x", "Linear", "down_proj", "re:.*", "..", ""])
def test_names_in_mask_files_are_names(base: Path, tmp_path: Path, name: str) -> None:
    """None of these is a parameter, though each would be a fine pattern."""
    codes = {name: torch.full((48,), 0x44, dtype=torch.uint8)}
    Masks(codes, {name: (16, 24)}).save(tmp_path / "m.safetensors")
    with pytest.raises(ProxsparseError, match=r"were made for another model: .* has no weight"):
        apply(base, tmp_path / "m.safetensors", tmp_path / "out", force=True)


def test_mask_bytes(pruned: Path, tmp_path: Path, more: bool) -> None:
    path = tmp_path / "m.safetensors"

    def check(data: bytes) -> None:
        path.write_bytes(data)
        attempt(lambda: Masks.load(path))

    fuzz(damaged((pruned / "proxsparse.masks").read_bytes()), check, 200, more)


def state() -> dict[str, Tensor]:
    return {"a/s": torch.zeros(3, 4), "a/m": torch.zeros(3, 4, dtype=torch.bfloat16)}


def test_checkpoint_header(tmp_path: Path, more: bool) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", "key")
    document, _ = header(checkpoints.save(2, state()))

    def check(value: Any) -> None:
        texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in value.items()}
        if any("\ud800" in text for text in texts.values()):
            return
        path = tmp_path / "checkpoints/step-00000002.safetensors"
        safetensors.torch.save_file(state(), path, metadata=texts)
        attempt(lambda: checkpoints.restore_(state(), {"a/s": 3, "a/m": 3}, 4))

    fuzz(mutated(document), check, 100, more)


def test_checkpoint_bytes(tmp_path: Path, more: bool) -> None:
    checkpoints = Checkpoints(tmp_path / "checkpoints", "key")
    path = checkpoints.save(2, state())
    whole = path.read_bytes()

    def check(data: bytes) -> None:
        path.write_bytes(data)
        attempt(lambda: checkpoints.restore_(state(), {"a/s": 3, "a/m": 3}, 4))

    fuzz(damaged(whole), check, 200, more)


def test_packed_config(packed: Path, copied: Any, more: bool) -> None:
    directory = copied(packed)
    path = directory / "config.json"
    config = json.loads(path.read_text())
    entry = config.pop("quantization_config")

    def check(value: Any) -> None:
        write_json(path, {**config, "quantization_config": value})
        attempt(lambda: load_model(directory, torch.device("cpu")))

    check([])
    check("proxsparse")
    fuzz(mutated(entry), check, 40, more)


def test_packed_bytes(packed: Path, copied: Any, more: bool) -> None:
    directory = copied(packed)
    path = directory / "model.safetensors"
    whole = path.read_bytes()

    def check(data: bytes) -> None:
        path.write_bytes(data)
        attempt(lambda: load_model(directory, torch.device("cpu")))

    fuzz(damaged(whole), check, 30, more)


def test_the_unharmed_files_are_read(packed: Path, pruned: Path, tmp_path: Path) -> None:
    """What the fuzzer starts from is sound, so that it does not find refusals only."""
    assert len(Masks.load(pruned / "proxsparse.masks")) == 14
    assert len((read_report(packed) or {})["layers"]) == 14
    assert len(unpack(packed, tmp_path / "dense")["layers"]) == 14
