"""What surrounds a command: launchers, terminals, threads, numbers that are none, haste."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import proxsparse
from proxsparse.cli import app
from proxsparse.errors import ProxsparseError
from proxsparse.jobs.evaluate import evaluate_perplexity
from proxsparse.jobs.pack import pack
from proxsparse.learning import launcher
from proxsparse.learning.layerwise import Gram, InputNorm, collect_input_norms, prune_block_by_block
from proxsparse.models.targets import find_targets

DEMO = str(Path(proxsparse.__file__).parent / "demo_model")
LAUNCHED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: Any) -> None:
    for name in LAUNCHED:
        monkeypatch.delenv(name, raising=False)


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def refused(result: Any) -> str:
    assert result.exit_code == 1 and isinstance(result.exception, SystemExit), result.exception
    (line,) = result.stderr.splitlines()
    assert line.startswith("proxsparse: ")
    return str(line)


@pytest.mark.parametrize("rank", ["1", "7", "x"])
def test_a_rank_alone_hides_nothing(tmp_path: Path, monkeypatch: Any, rank: str) -> None:
    monkeypatch.setenv("RANK", rank)
    assert "is not a directory" in refused(run("inspect", "./nowhere"))
    result = run("prune", DEMO, "--method", "magnitude", "-o", str(tmp_path / "out"), "--json")
    assert result.exit_code == 0 and json.loads(result.stdout.splitlines()[-1])["layers"]
    assert "42 layers pruned" in result.output


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "2"}, "RANK is None"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "RANK is 2 and WORLD_SIZE 2"),
        ({"WORLD_SIZE": "2", "RANK": "-1"}, "RANK is '-1'"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "MASTER_ADDR and MASTER_PORT is not set"),
        ({"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1"}, "MASTER_PORT is not set"),
    ],
)
def test_a_wrong_launcher_is_one_line(
    tmp_path: Path, monkeypatch: Any, environment: dict[str, str], message: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    result = run("prune", DEMO, "--device", "cpu", "-o", str(tmp_path / "out"))
    assert message in refused(result) and "torchrun" in result.stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["pack", "unpack", "apply", "demo", "inspect", "wanda"])
def test_commands_of_one_process_refuse_a_launcher(
    tmp_path: Path, monkeypatch: Any, command: str
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    out = ["-o", str(tmp_path / "out")]
    arguments = {
        "demo": ["demo", *out],
        "inspect": ["inspect", DEMO],
        "apply": ["apply", DEMO, "--mask", DEMO, *out],
        "wanda": ["prune", DEMO, "--method", "wanda", *out],
    }.get(command, [command, DEMO, *out])
    monkeypatch.setenv("RANK", "0")
    message = refused(run(*arguments))
    assert f"{command} runs in one process" in message and "without torchrun" in message
    monkeypatch.setenv("RANK", "1")
    silent = run(*arguments)
    assert silent.exit_code == 1 and silent.output == ""


def test_the_library_refuses_as_well(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        with pytest.raises(ProxsparseError, match="runs in one process"):
            pack(DEMO, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_of_one_process_the_rank_is_zero(monkeypatch: Any) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert launcher.rank() == 0 and launcher.is_main()


@pytest.mark.parametrize("name", ["a[/x]b", "[bold]", "a[link=file:x]", ":smile:", "[red]x[/red]"])
def test_names_are_printed_as_they_are(tmp_path: Path, name: str) -> None:
    output = tmp_path / name.replace("/", "∕") if "/" in name else tmp_path / name
    if name == "a[/x]b":  # a directory "a[" and in it "x]b"
        output = tmp_path / name
    result = run("prune", DEMO, "-o", str(output), "--method", "magnitude")
    assert result.exit_code == 0, result.output
    assert str(output) in result.output.replace("\n", "")
    assert run("inspect", str(output)).exit_code == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--method", "gate"], "unknown method 'gate'"),
        (["--steps", "0"], "--steps is 0"),
        (["--dtype", "fp16"], "--dtype is 'fp16': choose auto, float32"),
        (["--memory", "most"], "--memory is 'most': choose auto, fast"),
        (["--lam2", "1"], "lam2 is not used by method 'gates'"),
        (["--preset", "llama-9"], "unknown preset"),
        (["--calibration", "./missing.txt"], "there is no calibration text ./missing.txt"),
        (["--output", "pyproject.toml"], "exists and is not empty"),
        (["nowhere/at/all"], "is not a directory"),
    ],
)
def test_mistakes_that_need_no_model_need_no_torch(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    if not arguments[0].startswith("-"):
        arguments = ["prune", *arguments, "-o", str(tmp_path / "out")]
    elif arguments[0] == "--output":
        (tmp_path / arguments[1]).write_text("x")
        arguments = ["prune", DEMO, "--output", str(tmp_path / arguments[1])]
    else:
        arguments = ["prune", DEMO, "-o", str(tmp_path / "out"), *arguments]
    code = (
        "import sys; from proxsparse.cli import main\n"
        f"sys.argv = ['proxsparse', *{arguments!r}]\n"
        "try: main()\n"
        "finally: print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    )
    began = time.process_time()
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and message in done.stderr
    assert len(done.stderr.splitlines()) == 1 and done.stdout == "set()\n"
    assert time.process_time() - began < 1


def test_importing_from_two_threads_does_not_deadlock() -> None:
    """Thread A imports transformers' registry, B our quantiser, each in reach of the other's."""
    code = """
import sys, threading, time
import proxsparse
from importlib.abc import MetaPathFinder
barrier = threading.Barrier(2)
class Meet(MetaPathFinder):
    seen = set()
    def find_spec(self, name, path=None, target=None):
        # Each thread holds the lock of its own module by now.
        wanted = {"transformers.quantizers.auto", "proxsparse.inference.quantizer"}
        if name in wanted and name not in self.seen:
            self.seen.add(name)
            try: barrier.wait(3)
            except threading.BrokenBarrierError: pass
        return None
sys.meta_path.insert(0, Meet())
errors = []
def load(name):
    try: __import__(name)
    except BaseException as error: errors.append(repr(error))
names = ["transformers.quantizers.auto", "proxsparse.inference.quantizer"]
threads = [threading.Thread(target=load, args=(name,), daemon=True) for name in names]
for thread in threads: thread.start()
for thread in threads: thread.join(60)
assert not any(thread.is_alive() for thread in threads), "deadlock"
assert not errors, errors
auto = sys.modules["transformers.quantizers.auto"]
config = auto.AutoQuantizationConfig.from_dict({"quant_method": "proxsparse", "layers": ["a"]})
assert config.layers == ["a"]
print("done")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=150, check=False
    )
    assert done.stdout == "done\n", done.stderr[-2000:]


@pytest.mark.parametrize("statistic", [InputNorm, Gram])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_inputs_that_are_no_numbers_are_refused_by_name(
    tiny_model: Any, statistic: Any, value: float
) -> None:
    model = tiny_model("llama")
    model.model.layers[1].post_attention_layernorm.weight.data[3] = value
    targets, tokens = find_targets(model), torch.randint(3, 96, (2, 16))
    seen: list[str] = []
    with pytest.raises(ProxsparseError, match=r"inputs of model.layers.1.mlp.\w+ are NaN, inf"):
        prune_block_by_block(model, targets, tokens, statistic, lambda t, _: seen.append(t.name))
    assert seen and all(name.startswith(("model.layers.0", "model.layers.1.self")) for name in seen)
    with pytest.raises(ProxsparseError, match=r"inputs of model.layers.1.mlp"):
        collect_input_norms(model, targets, tokens)


@pytest.mark.parametrize("statistic", [InputNorm, Gram])
@pytest.mark.parametrize("tokens", [0, None])
def test_a_layer_that_saw_nothing_is_refused_by_name(
    tiny_model: Any, statistic: Any, tokens: int | None
) -> None:
    """Whether it was called with no tokens or not at all."""
    target = find_targets(tiny_model("llama")).layers[0]
    seen = statistic(target, torch.device("cpu"))
    if tokens is not None:
        seen.add(None, torch.zeros(tokens, target.shape[-1]))
    with pytest.raises(ProxsparseError, match=r"q_proj saw no input .*--ignore"):
        seen.check(target.name)


def test_an_expert_that_saw_nothing_is_said_and_kept(tiny_model: Any, caplog: Any) -> None:
    from proxsparse.config import LearnConfig, SparseGPTOptions
    from proxsparse.learning.job import Job
    from proxsparse.methods import METHODS

    model = tiny_model("qwen3_moe")
    tokens = torch.full((1, 2), 5)  # one token reaches two of four experts
    job = Job(model, find_targets(model), tokens, LearnConfig(), SparseGPTOptions())
    masks = METHODS["sparsegpt"].run(job)
    assert "of 4 experts saw no token" in caplog.text
    for target in job.targets.layers:
        kept = masks[target.parameter_name]
        groups = kept.flatten(0, -2).sum(-1) * 2 == kept.shape[-1]
        assert groups.all()
        if "experts" in target.name:  # no expert was zeroed for want of tokens
            assert (target.weight().flatten(1).abs().sum(-1) > 0).all()


@pytest.fixture(scope="module")
def broken(tmp_path_factory: Any) -> Path:
    """The demo model with a NaN in its last norm, which no check of layers looks at."""
    from safetensors import safe_open
    from safetensors.torch import save_file

    directory: Path = tmp_path_factory.mktemp("nan") / "model"
    shutil.copytree(DEMO, directory)
    with safe_open(str(directory / "model.safetensors"), framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def test_eval_of_a_broken_model_is_an_error(broken: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(Path(json.__file__).read_text())
    result = run("eval", str(broken), "--data", str(tmp_path / "text.txt"), "--json")
    assert "has no perplexity" in refused(result)
    assert "has no perplexity" in json.loads(result.stdout.splitlines()[-1])["error"]


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_a_perplexity_is_a_number(tiny_model: Any, value: float) -> None:
    model = tiny_model("llama")
    model.lm_head.weight.data[5] = value
    with pytest.raises(ProxsparseError, match="the loss of LlamaForCausalLM is"):
        evaluate_perplexity(model, torch.randint(3, 96, (2, 16)))


def test_json_holds_no_nan(monkeypatch: Any) -> None:
    from proxsparse.jobs import compare

    figures = {"tasks": {"task": {"acc": 0.5, "acc_stderr": float("nan"), "x": [float("inf")]}}}
    monkeypatch.setattr(compare, "evaluate_models", lambda *_: {DEMO: figures})
    result = run("eval", DEMO, "--tasks", "task", "--json")
    found = json.loads(result.stdout.splitlines()[-1], parse_constant=pytest.fail)
    assert found == {"tasks": {"task": {"acc": 0.5, "acc_stderr": None, "x": [None]}}}


def test_environment_is_left_alone() -> None:
    assert not any(name in os.environ for name in LAUNCHED)
