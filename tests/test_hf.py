"""Packed models through transformers' own save and load, and how it comes to know them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from proxsparse import ProxsparseError, SparseLinear, densify_, ops, sparsify_
from proxsparse.inference.sparse_linear import sparse_layers
from proxsparse.models.targets import find_targets

TinyModel = Callable[[str], Any]
ROOT = Path(__file__).resolve().parents[1]


def prune_(model: Any) -> Any:
    for target in find_targets(model).layers:
        target.set_weight_(ops.project_2to4(target.weight()))
    return model


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model(input_ids=torch.arange(3, 11)[None], use_cache=False).logits


def load(directory: Path, **settings: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto", **settings)


def sparse_names(model: Any) -> list[str]:
    return [name for name, m in model.named_modules() if isinstance(m, SparseLinear)]


@pytest.fixture
def packed(tiny_model: TinyModel, tmp_path: Path) -> tuple[Any, Path]:
    model = prune_(tiny_model("llama")).to(torch.bfloat16)
    sparsify_(model)
    model.save_pretrained(tmp_path / "packed")
    return model, tmp_path / "packed"


def test_save_and_load_of_every_architecture(
    tiny_model: TinyModel, tiny_model_name: str, tmp_path: Path
) -> None:
    model = prune_(tiny_model(tiny_model_name))
    expected, before = logits(model), {k: v.clone() for k, v in model.state_dict().items()}
    sparsify_(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert sparse_names(loaded) == sparse_names(model)
    # Not bitwise: how a weight is aligned in its file decides which kernel of the BLAS takes it.
    torch.testing.assert_close(logits(loaded), logits(model))
    densify_(loaded)
    after = loaded.state_dict()
    assert list(after) == list(before)
    for name, w in before.items():
        assert torch.equal(after[name].view(torch.uint8), w.view(torch.uint8)), name
    torch.testing.assert_close(logits(loaded), expected)


def test_config_names_the_layers(packed: Any) -> None:
    model, directory = packed
    entry = json.loads((directory / "config.json").read_text())["quantization_config"]
    assert entry == {
        "quant_method": "proxsparse",
        "format_version": 2,
        "keep_dense": False,
        "layers": sparse_names(model),
    }


def test_loading_makes_no_dense_weight(packed: Any, monkeypatch: Any) -> None:
    """Neither unpacked nor allocated: the largest tensor of a packed layer is its values."""
    _, directory = packed

    def refuse(*_: Any) -> None:
        raise AssertionError("a weight was unpacked")

    monkeypatch.setattr(ops, "unpack_2to4", refuse)
    loaded = load(directory)
    for name in sparse_names(loaded):
        layer = loaded.get_submodule(name)
        assert layer.dense is None and "weight" not in layer._parameters
        assert layer.values.dtype == torch.bfloat16 and layer.codes.dtype == torch.uint8
    with safe_open(directory / "model.safetensors", "pt") as file:
        for name in sparse_names(loaded):
            assert file.get_slice(f"{name}.weight").get_shape() == [0]


def test_saving_again_writes_the_same_bytes(packed: Any, tmp_path: Path) -> None:
    _, directory = packed
    loaded = load(directory)
    loaded.save_pretrained(tmp_path / "again")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "again" / file).read_bytes() == (directory / file).read_bytes()


@pytest.mark.parametrize("device_map", ["cpu", "auto"])
def test_device_maps_and_dtypes(packed: Any, device_map: str) -> None:
    model, directory = packed
    loaded = AutoModelForCausalLM.from_pretrained(
        directory, device_map=device_map, dtype=torch.float32
    )
    assert loaded.get_submodule(sparse_names(model)[0]).values.dtype == torch.float32
    torch.testing.assert_close(logits(loaded), logits(model.to(torch.float32)))


def test_disk_offload(packed: Any, tmp_path: Path) -> None:
    _, directory = packed
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    settings = {"offload_folder": tmp_path / "offload", "offload_buffers": True}
    loaded = load(directory, device_map=device_map, **settings)
    assert torch.equal(logits(loaded), logits(load(directory)))


def test_keep_dense_is_saved_and_builds_the_dense_form(
    tiny_model: TinyModel, tmp_path: Path
) -> None:
    model = prune_(tiny_model("gpt2"))
    sparsify_(model, keep_dense=True)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    layer = loaded.get_submodule(sparse_names(loaded)[0])
    assert layer.keep_dense and torch.equal(layer.dense, ops.unpack_2to4(layer.values, layer.codes))


@pytest.mark.parametrize(("memory", "keep_dense"), [("min", False), ("fast", True)])
def test_configs_of_earlier_versions_are_read(packed: Any, memory: str, keep_dense: bool) -> None:
    _, directory = packed
    config = json.loads((directory / "config.json").read_text())
    del config["quantization_config"]["keep_dense"]
    config["quantization_config"]["memory"] = memory
    (directory / "config.json").write_text(json.dumps(config))
    loaded = load(directory)
    assert all(layer.keep_dense == keep_dense for layer in sparse_layers(loaded).values())
    assert "memory" not in loaded.config.to_dict()["quantization_config"]


def test_dequantize_is_densify(packed: Any) -> None:
    _, directory = packed
    loaded = load(directory)
    loaded.dequantize()
    assert not sparse_names(loaded) and not hasattr(loaded.config, "quantization_config")
    assert torch.equal(logits(loaded), logits(load(directory)))
    find_targets(loaded)  # an ordinary model again
    assert sparsify_(loaded).sparse


def test_generates_with_a_static_cache(packed: Any) -> None:
    _, directory = packed
    loaded = load(directory)
    x = torch.arange(3, 9)[None]
    settings = {"max_new_tokens": 4, "do_sample": False, "disable_compile": True}
    static = loaded.generate(x, cache_implementation="static", **settings)
    densify_(loaded)
    assert torch.equal(static, loaded.generate(x, cache_implementation="static", **settings))


def test_corrupt_codes_are_refused(packed: Any) -> None:
    _, directory = packed
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.codes"][0, 0] = 0x45  # both kept places are the second
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        ProxsparseError, match=r"layers.1.mlp.up_proj is not 2:4: group 0 has code 5"
    ):
        AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 4}, "packed in format 4, this proxsparse reads up to 3"),
        ({"format_version": 3}, "packed in format 3 and its scheme is None"),
        ({"scheme": "FP8_DYNAMIC"}, "packed in format 2 and its scheme is 'FP8_DYNAMIC'"),
        ({"scheme": "INT4"}, "the scheme of the model is 'INT4': choose FP8_DYNAMIC"),
        ({"memory": "max"}, "memory is 'max': it must be min or fast"),
        ({"keep_dense": "yes"}, "keep_dense is 'yes': it must be True or False"),
        (
            {"layers": ["model.layers.9.mlp.up_proj"]},
            "layers.9.mlp.up_proj does not exist in Llama",
        ),
        ({"layers": ["model.norm"]}, "model.norm is a LlamaRMSNorm in LlamaForCausalLM, not a lin"),
    ],
)
def test_configs_that_do_not_fit(packed: Any, change: dict[str, Any], message: str) -> None:
    _, directory = packed
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] |= change
    (directory / "config.json").write_text(json.dumps(config))
    with pytest.raises(ProxsparseError, match=message):
        AutoModelForCausalLM.from_pretrained(directory)


@pytest.mark.parametrize(
    "imports",
    [
        "import proxsparse; from transformers import AutoModelForCausalLM",
        "from transformers import AutoModelForCausalLM; import proxsparse",
        "import transformers.quantizers.auto, proxsparse; from transformers import "
        "AutoModelForCausalLM",
    ],
)
def test_registration_in_any_order(packed: Any, imports: str) -> None:
    _, directory = packed
    code = f"""{imports}
import sys
model = AutoModelForCausalLM.from_pretrained({str(directory)!r})
print(type(model.model.layers[0].mlp.up_proj).__name__)
from transformers.quantizers import auto
assert auto.__loader__ is auto.__spec__.loader and "proxsparse" not in repr(auto.__loader__)
ours = [f.registry for f in sys.meta_path if "proxsparse" in type(f).__module__]
assert set(ours) <= {{"peft.tuners.lora.model"}}, ours  # which nobody has imported
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "SparseLinear", done.stderr


def run_python(code: str, *paths: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(str(p) for p in (*paths, ROOT))
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT.parent,
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture
def installed(tmp_path: Path) -> Path:
    """A folder for sys.path that has our entry point, as an installed package has."""
    folder = tmp_path / "site/proxsparse_entry-0.dist-info"
    folder.mkdir(parents=True)
    project = (ROOT / "pyproject.toml").read_text()
    entry = re.search(r'entry-points."torch.backends"\]\n(.*)\n', project)
    assert entry is not None
    (folder / "entry_points.txt").write_text(f"[torch.backends]\n{entry[1].replace(chr(34), '')}\n")
    (folder / "METADATA").write_text("Metadata-Version: 2.1\nName: proxsparse-entry\nVersion: 0\n")
    return folder.parent


@pytest.mark.parametrize(
    "imports",
    [
        "from transformers import AutoModelForCausalLM",
        "import torch; from transformers import AutoModelForCausalLM",
        "import transformers.quantizers.auto; from transformers import AutoModelForCausalLM",
    ],
)
def test_nobody_has_to_import_proxsparse(packed: Any, installed: Path, imports: str) -> None:
    _, directory = packed
    done = run_python(
        f"""{imports}
import sys, torch
assert "proxsparse.inference.quantizer" not in sys.modules
model = AutoModelForCausalLM.from_pretrained({str(directory)!r})
print(type(model.model.layers[0].mlp.up_proj).__name__)
ours = [f.registry for f in sys.meta_path if "proxsparse" in type(f).__module__]
assert set(ours) <= {{"peft.tuners.lora.model"}}, ours  # which nobody has imported
""",
        installed,
    )
    assert done.stdout.strip() == "SparseLinear", done.stderr
    assert "weight" not in done.stderr.replace("Loading weights", "")  # no word about leftovers


def test_import_torch_stays_light_and_cannot_fail(installed: Path) -> None:
    done = run_python(
        "import sys, torch; print('proxsparse' in sys.modules,"
        " [m for m in sys.modules if m.split('.')[0] in ('transformers', 'safetensors')])",
        installed,
    )
    assert done.stdout.strip() == "True []", done.stderr
    code = """
from proxsparse.inference import registration
def fail(): raise OSError("broken")
registration.register = fail
registration.autoload()
"""
    done = run_python(code)
    assert done.returncode == 0 and "broken" in done.stderr


@pytest.mark.parametrize("imports", ["transformers", "torch, transformers.quantizers.auto"])
def test_a_transformers_without_us_stops(packed: Any, imports: str) -> None:
    _, directory = packed
    code = f"""import {imports}
from transformers import AutoModelForCausalLM
AutoModelForCausalLM.from_pretrained({str(directory)!r})
"""
    done = run_python(code, TORCH_DEVICE_BACKEND_AUTOLOAD="0")
    assert done.returncode != 0 and "size" in done.stderr.splitlines()[-1], done.stderr[-500:]


def test_reads_what_older_versions_packed(packed: Any) -> None:
    model, directory = packed
    file, config = directory / "model.safetensors", directory / "config.json"
    tensors = {k: v for k, v in load_file(file).items() if v.numel()}
    save_file(tensors, file, metadata={"format": "pt"})
    config.write_text(config.read_text().replace('"format_version": 2', '"format_version": 1'))
    loaded = load(directory)
    state = model.state_dict()
    assert all(torch.equal(x, state[name]) for name, x in loaded.state_dict().items())
    assert loaded.config.quantization_config.format_version == 2  # and so it is written again


@pytest.mark.parametrize("form", ["values", "codes"])
def test_a_form_that_is_missing_is_refused(packed: Any, form: str) -> None:
    _, directory = packed
    tensors = load_file(directory / "model.safetensors")
    del tensors[f"model.layers.1.mlp.up_proj.{form}"]
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ProxsparseError, match=r"layers\.1\.mlp\.up_proj"):
        load(directory)


def test_codes_of_offloaded_layers_are_looked_at_too(packed: Any, tmp_path: Path) -> None:
    _, directory = packed
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.codes"][0, 0] = 0x45
    save_file(tensors, file, metadata={"format": "pt"})
    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    settings = {"offload_folder": tmp_path / "offload", "offload_buffers": True}
    with pytest.raises(ProxsparseError, match="up_proj is not 2:4"):
        load(directory, device_map=device_map, **settings)


def test_two_threads_do_not_wait_for_each_other() -> None:
    code = """
import importlib, threading, proxsparse
names = ("proxsparse.inference.quantizer", "transformers.quantizers.auto")
threads = [threading.Thread(target=importlib.import_module, args=(n,), daemon=True) for n in names]
[t.start() for t in threads]; [t.join(60) for t in threads]
assert not any(t.is_alive() for t in threads)
from transformers.quantizers import auto
assert auto.AUTO_QUANTIZER_MAPPING["proxsparse"].__name__ == "PackedQuantizer"
"""
    done = run_python(code)
    assert done.returncode == 0, done.stderr


def test_registering_twice_is_once() -> None:
    code = """
import sys, proxsparse
from proxsparse.inference.registration import register
register()
assert sum("proxsparse" in type(f).__module__ for f in sys.meta_path) == 2  # peft as well
import transformers.quantizers.auto as auto
register()
assert "proxsparse" in auto.AUTO_QUANTIZER_MAPPING
"""
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=120)
