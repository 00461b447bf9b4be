"""The estimate, the choice of a mode, and what is said when nothing fits."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from proxsparse.errors import ProxsparseError
from proxsparse.jobs import prune as pruning
from proxsparse.jobs.prune import learn_masks, prune
from proxsparse.learning import memory
from proxsparse.learning.memory import choose_memory, estimate_memory
from proxsparse.methods import METHODS
from proxsparse.models.loading import build_model
from proxsparse.models.targets import find_targets

GATES, CPU = METHODS["gates"].memory, torch.device("cpu")
LLAMA_8B = """{"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256,
"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "dtype": "bfloat16",
"num_attention_heads": 32, "num_key_value_heads": 8, "tie_word_embeddings": false}"""


@pytest.fixture
def llama_8b(tmp_path: Path) -> Any:
    (tmp_path / "config.json").write_text(LLAMA_8B)
    return build_model(tmp_path / "config.json", torch.device("meta"))


def give(monkeypatch: Any, gigabytes: float) -> None:
    monkeypatch.setattr(memory, "available_memory", lambda *_: gigabytes * 1e9)


def test_estimate_of_an_8b_model(llama_8b: Any) -> None:
    """8 bytes per weight and 5, and room for the rest on cards of 80 and 48 GB."""
    targets = find_targets(llama_8b)
    parts = {
        mode: estimate_memory(llama_8b, targets, mode, bytes_, 4096, torch.device("cuda"))
        for mode, bytes_ in GATES.items()
    }
    assert parts["balanced"].weights == parts["low"].weights == 2 * 8_030_261_248
    assert 58e9 < parts["balanced"].total < 72e9
    assert 37e9 < parts["low"].total < 46e9
    assert parts["fast"].total > 140e9


@pytest.mark.parametrize(
    ("available", "mode"), [(400, "balanced"), (80, "balanced"), (48, "low"), (44, "low")]
)
def test_auto_takes_the_first_that_fits(
    llama_8b: Any, available: float, mode: str, monkeypatch: Any, caplog: Any
) -> None:
    give(monkeypatch, available)
    caplog.set_level(logging.INFO, "proxsparse")
    targets = find_targets(llama_8b)
    chosen = choose_memory(llama_8b, targets, "auto", GATES, 4096, torch.device("cuda"))
    assert chosen == mode
    (line,) = caplog.messages
    assert line.startswith(f"--memory {mode} takes about ") and "logits" in line


def test_what_does_not_fit_is_refused_with_what_does(llama_8b: Any, monkeypatch: Any) -> None:
    targets, cuda = find_targets(llama_8b), torch.device("cuda")
    give(monkeypatch, 48)
    with pytest.raises(
        ProxsparseError, match=r"balanced takes about .* but cuda has 48 GB: --memory low fits"
    ):
        choose_memory(llama_8b, targets, "balanced", GATES, 4096, cuda)
    give(monkeypatch, 10)
    for wanted in ("auto", "low"):
        with pytest.raises(ProxsparseError, match="has 10 GB: no mode fits; a smaller --batch"):
            choose_memory(llama_8b, targets, wanted, GATES, 4096, cuda)


def test_small_models_are_fast(tiny_model: Any) -> None:
    model = tiny_model("llama")
    assert choose_memory(model, find_targets(model), "auto", GATES, 64, CPU) == "fast"


def test_proxsparse_has_no_low(tiny_model: Any) -> None:
    message = r"--memory low is not possible .* only fast, balanced"
    with pytest.raises(ProxsparseError, match=message):
        learn(tiny_model("llama"), method="proxsparse", memory="low")


def test_nothing_is_loaded_when_it_cannot_fit(tmp_path: Path, monkeypatch: Any) -> None:
    (tmp_path / "config.json").write_text(LLAMA_8B)
    give(monkeypatch, 10)
    monkeypatch.setattr(pruning, "_load_base", lambda *_: pytest.fail("loaded"))
    with pytest.raises(ProxsparseError, match="no mode fits"):
        prune(tmp_path / "config.json", tmp_path / "out", random_init=True, device="cpu")
    assert not (tmp_path / "out.partial").exists()


def learn(model: Any, **settings: Any) -> None:
    """A short run on random tokens."""
    tokens = torch.randint(96, (4, 16))
    short = {"max_seq_length": 16, "num_calibration_samples": 4, "steps": 2, "batch_size": 2}
    learn_masks(model, [tokens], **{**short, **settings})


def test_out_of_memory_names_the_next_mode(tiny_model: Any, monkeypatch: Any) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")

    monkeypatch.setattr("proxsparse.learning.loop._Run.step", fail)
    for mode, way_out in (("fast", "--memory balanced, a smaller"), ("low", "try a smaller")):
        with pytest.raises(ProxsparseError, match=rf"out of memory .*2 GiB\): .*{way_out}"):
            learn(tiny_model("llama"), memory=mode)


def test_random_init_needs_neither_weights_nor_text(tmp_path: Path, tiny_model: Any) -> None:
    tiny_model("llama").config.save_pretrained(tmp_path / "shape")
    settings: dict[str, Any] = {"steps": 2, "batch_size": 2, "max_seq_length": 16, "device": "cpu"}
    for memory_mode in ("balanced", "low"):
        result = prune(
            tmp_path / "shape",
            tmp_path / memory_mode,
            random_init=True,
            memory=memory_mode,
            **settings,
        )
        assert result.report["data"]["source"] == "random tokens"
        assert result.history[-1]["memory_gb"] > 0
        assert (tmp_path / memory_mode / "model.safetensors").is_file()


def test_tracker_that_is_not_there(tiny_model: Any) -> None:
    with pytest.raises(ProxsparseError, match=r"--tracker nonesuch cannot be used .*leave"):
        learn(tiny_model("llama"), tracker="nonesuch")


def test_a_tracker_gets_every_record(tiny_model: Any, monkeypatch: Any) -> None:
    import accelerate

    logged = []

    class Accelerator:
        trackers = ("fake",)

        def __init__(self, **_: Any) -> None: ...
        def init_trackers(self, *_: Any, **__: Any) -> None: ...
        def end_training(self) -> None:
            logged.append("end")

        def log(self, record: dict[str, float], step: int) -> None:
            logged.append((step, record["loss"]))

    monkeypatch.setattr(accelerate, "Accelerator", Accelerator)
    learn(tiny_model("llama"), steps=20, checkpoint_every=0, tracker="fake")
    assert [x if x == "end" else x[0] for x in logged] == [10, 20, "end"]
