"""The commands as a user types them: flags from the configs, JSON, errors, exit codes."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import proxsparse
from proxsparse.cli import app
from proxsparse.config import METHOD_OPTIONS, CalibrationConfig, LearnConfig, TargetConfig

DEMO = str(Path(proxsparse.__file__).parent / "demo_model")


def run(*arguments: str) -> Any:
    return CliRunner().invoke(app, list(arguments), env={"COLUMNS": "200"})


def last_json(result: Any) -> dict[str, Any]:
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout.splitlines()[-1])


def test_every_setting_has_a_flag_with_help() -> None:
    text = " ".join(run("prune", "--help").output.split())
    for config in (CalibrationConfig, TargetConfig, LearnConfig, *METHOD_OPTIONS.values()):
        for field in dataclasses.fields(config):
            assert f"--{field.name.replace('_', '-')}" in text
            assert field.metadata["help"].split(".")[0][:30] in text
    for flag in ("--method", "--preset", "--resume", "--output", "--json", "--device", "--dtype"):
        assert flag in text


def test_prune_inspect_apply_eval(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(json.__file__).read_text())
    out, again = tmp_path / "out", tmp_path / "again"
    settings = ["--calibration", str(text), "--method", "wanda", "--num-calibration-samples", "4"]
    settings += ["--max-seq-length", "64", "--ignore", "down_proj", "--ignore", "re:.*k_proj"]
    report = last_json(run("prune", DEMO, "--output", str(out), *settings, "--json"))
    assert report["recipe"]["ignore"] == ["down_proj", "re:.*k_proj"]
    assert report["data"]["tokens"] == 256 and len(report["layers"]) == 30
    assert "ignored" in report["left_dense"]["model.layers.0.mlp.down_proj"]

    rows = last_json(run("inspect", str(out), "--base", DEMO, "--json"))
    assert rows["num_2to4"] == 30 and rows["num_layers"] == 42 and rows["mask_file"] == "matches"
    assert all(row["kept_bitwise"] and row["negative_zeros"] == 0 for row in rows["layers"])
    table = run("inspect", str(out))
    assert table.exit_code == 0 and "30 of 42 layers are 2:4" in table.output

    for place, mask in ((again, out / "proxsparse.masks"), (tmp_path / "third", out)):
        assert run("apply", DEMO, "--mask", str(mask), "--output", str(place)).exit_code == 0
        weights = (place / "model.safetensors").read_bytes()
        assert weights == (out / "model.safetensors").read_bytes()

    figures = last_json(run("eval", str(out), "--data", str(text), "--json"))
    dense = last_json(run("eval", DEMO, "--data", str(text), "--json"))
    assert figures["tokens"] == dense["tokens"] and figures["perplexity"] > dense["perplexity"]


def test_human_output_names_tokens_and_dense_layers(tmp_path: Path) -> None:
    result = run("prune", DEMO, "-o", str(tmp_path / "out"), "--method", "magnitude")
    assert result.exit_code == 0, result.output
    assert "left dense: lm_head (tied to embeddings" in result.output
    assert "magnitude: 42 layers pruned to 2:4" in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prune", "nowhere/at/all", "--method", "magnitude"], "is not a directory"),
        (["prune", DEMO, "--calibration", "missing.txt"], "missing.txt"),
        (["prune", DEMO, "--method", "best"], "unknown method 'best'"),
        (["prune", DEMO, "--steps", "0"], "--steps is 0"),
        (["prune", DEMO, "--lr", "-1"], "--lr is -1"),
        (["apply", DEMO, "--mask", "none.safetensors"], "there is no mask file"),
    ],
)
def test_errors_are_one_sentence_and_exit_code_1(
    tmp_path: Path, arguments: list[str], message: str
) -> None:
    result = run(*arguments, "--output", str(tmp_path / "out"), "--json")
    assert result.exit_code == 1
    assert result.stderr.startswith("proxsparse: ") and message in result.stderr
    assert "Traceback" not in result.output
    assert message in json.loads(result.stdout.splitlines()[-1])["error"]
    assert not (tmp_path / "out").exists()


def test_eval_says_what_it_cannot_measure(monkeypatch: Any) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result = run("eval", DEMO, "--data", "missing.txt")
    assert result.exit_code == 1 and "there is no text missing.txt" in result.stderr
    result = run("eval", DEMO, "--data", "self")
    assert result.exit_code == 1 and "says nothing about" in result.stderr
    result = run("eval", DEMO)  # WikiText-2, which is not here
    assert result.exit_code == 1 and "Salesforce/wikitext" in result.stderr
    assert "(wikitext-2-raw-v1, test)" in result.stderr and "Traceback" not in result.output


def test_several_models_in_one_table(tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(Path(json.__file__).read_text())
    out = str(tmp_path / "out")
    assert run("prune", DEMO, "-o", out, "--method", "magnitude", "-q").output == ""
    settings = ["--data", str(text), "--max-seq-length", "128"]
    found = last_json(run("eval", DEMO, out, *settings, "--json"))["models"]
    assert list(found) == [DEMO, out]
    assert found[out]["perplexity"] > found[DEMO]["perplexity"]
    table = run("eval", DEMO, out, *settings).output
    for model in found:
        assert f"{found[model]['perplexity']:.4f}" in table


def test_a_run_says_what_it_cost(tmp_path: Path) -> None:
    settings = ["--method", "wanda", "--num-calibration-samples", "4", "--max-seq-length", "64"]
    text = tmp_path / "text.txt"
    text.write_text(Path(json.__file__).read_text())
    out = tmp_path / "out"
    result = run("prune", DEMO, "--calibration", str(text), "-o", str(out), *settings)
    report = json.loads((out / "proxsparse.json").read_text())
    quality = report["quality"]
    assert quality["perplexity"] > quality["perplexity_dense"] > 1
    assert quality["tokens"] % 64 == 0 and 0 < quality["tokens"] <= 16384
    for figure in (quality["perplexity"], quality["perplexity_dense"]):
        assert (
            f"{figure:.2f}" in result.output and f"{figure:.2f}" in (out / "README.md").read_text()
        )
    assert "34 more (-v)" in result.output and "0.self_attn.q_proj" in result.output
    assert "2.mlp.up_proj" not in result.output

    # What it was made with makes it again, bit by bit; without quality, and with every layer.
    again = tmp_path / "again"
    recipe = ["--config", str(out / "proxsparse.json"), "--no-quality", "-v"]
    result = run("prune", DEMO, "-o", str(again), *recipe)
    assert result.exit_code == 0, result.output
    assert "2.mlp.up_proj" in result.output and "perplexity" not in result.output
    weights = (again / "model.safetensors").read_bytes()
    assert weights == (out / "model.safetensors").read_bytes()
    assert json.loads((again / "proxsparse.json").read_text())["recipe"] == report["recipe"]


def test_settings_from_a_file(tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text("method: wanda\nmax-seq-length: 64\nignore: [down_proj, k_proj]\n")
    plan = ["prune", DEMO, "-o", "x", "--calibration", "stdlib", "--dry-run", "--json"]
    recipe = last_json(run(*plan, "--config", str(config)))["recipe"]
    assert recipe["method"] == "wanda" and recipe["max_seq_length"] == 64
    assert recipe["ignore"] == ["down_proj", "k_proj"]
    recipe = last_json(run(*plan, "--config", str(config), "--max-seq-length", "32"))["recipe"]
    assert recipe["max_seq_length"] == 32
    for text, message in (
        ("max-seq-len: 64", "did you mean max_seq_length"),
        ("- wanda", "holds no mapping"),
        ("a: [", "cannot be read as YAML"),
    ):
        config.write_text(text)
        result = run(*plan, "--config", str(config))
        assert result.exit_code == 1 and message in result.stderr
    assert "no file of settings" in run(*plan, "--config", "none.yaml").stderr


def test_a_dry_run_reads_and_writes_nothing(tmp_path: Path) -> None:
    shape = tmp_path / "config.json"
    shutil.copy(Path(DEMO) / "config.json", shape)
    settings = ["-o", str(tmp_path / "out"), "--tokens", "1M", "--calibration", "stdlib"]
    plan = last_json(run("prune", str(shape), *settings, "--dry-run", "--json"))
    assert len(plan["layers"]) == 42 and plan["pruned_weights"] == 2433024
    assert 1e6 <= plan["tokens"] < 1.01e6 and plan["seconds"] > 0
    assert plan["recipe"]["lr"] == 0.06 and plan["recipe"]["lam"] == 3.0
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]
    text = " ".join(run("prune", str(shape), *settings, "--dry-run").output.split())
    assert "would prune 42 layers" in text and "estimated time: at least" in text


def test_lists_take_commas(tmp_path: Path) -> None:
    arguments = ["prune", DEMO, "-o", str(tmp_path / "out"), "--method", "magnitude", "--dry-run"]
    several = ["--ignore", "down_proj, k_proj", "--ignore", "re:.*[qo]_proj{1,2}", "--json"]
    recipe = last_json(run(*arguments, *several))["recipe"]
    assert recipe["ignore"] == ["down_proj", "k_proj", "re:.*[qo]_proj{1,2}"]


def test_help_has_groups_defaults_and_a_short_form() -> None:
    text = run("prune", "-h").output
    for title in ("Calibration:", "Learning:", "Only for method proxsparse:", "Output:"):
        assert f"\n{title}\n" in text
    assert text.index("Only for method") < text.index("\nOutput:") and "[default: 400]" in text
    assert "install-completion" in run("--help").output


def test_results_fit_80_columns() -> None:
    for arguments in (["inspect", DEMO], ["env"]):
        result = CliRunner().invoke(app, arguments, env={"COLUMNS": "80"})
        assert result.exit_code == 0 and "…" not in result.output
        assert max(map(len, result.output.splitlines())) <= 80


def test_eval_tasks_without_lm_eval(monkeypatch: Any) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    result = run("eval", DEMO, "--tasks", "arc_easy")
    assert result.exit_code == 1 and "pip install 'proxsparse[eval]'" in result.stderr


def test_env_reports_each_backend() -> None:
    result = last_json(run("env", "--json"))
    assert result["ops"]["prox_2to4"]["reference"] == "yes"
    for backends in result["ops"].values():
        assert all(value == "yes" or value.startswith("no: ") for value in backends.values())
    assert "prox_2to4" in run("env").output


def test_inspect_of_a_dense_model_says_no(tmp_path: Path) -> None:
    result = last_json(run("inspect", DEMO, "--json"))
    assert result["num_2to4"] == 0 and result["mask_file"] is None
    shutil.copytree(DEMO, tmp_path / "model")
    assert last_json(run("inspect", str(tmp_path / "model"), "--json"))["num_layers"] == 42


def test_version_and_no_command() -> None:
    assert run("--version").output.strip() == proxsparse.__version__
    assert "prune" in run().output


def test_help_is_fast_and_light() -> None:
    import subprocess
    import sys

    code = "import sys; import proxsparse.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.fixture(scope="module")
def pruned(tmp_path_factory: Any) -> Path:
    output: Path = tmp_path_factory.mktemp("pruned") / "model"
    proxsparse.prune(DEMO, output, method="magnitude")
    return output


def test_pack_inspect_generate_unpack(pruned: Path, tmp_path: Path) -> None:
    packed, dense = str(tmp_path / "packed"), tmp_path / "dense"
    result = last_json(run("pack", str(pruned), "-o", packed, "--json"))
    assert result["packed_bytes"] / result["dense_bytes"] == 0.5625
    assert "42 of 42 layers are 2:4, 42 of them packed" in run("inspect", packed).output

    arguments = ["generate", packed, "--prompt", "import", "--max-new-tokens", "2"]
    result = last_json(run(*arguments, "--device", "cpu", "--json"))
    assert result["same_tokens"] and result["sparse_layers"] == 42 and result["speedup"] > 0
    assert set(result["runs"]) == {"dense", "sparse"}
    sizes = [result["runs"][kind]["weight_bytes"] for kind in ("sparse", "dense")]
    assert sizes == last_json(run("unpack", packed, "-o", str(dense), "--json"))["checkpoint_bytes"]
    assert (dense / "model.safetensors").read_bytes() == (pruned / "model.safetensors").read_bytes()


def test_generate_shows_both_speeds_and_the_backend(pruned: Path) -> None:
    arguments = ["generate", str(pruned), "--prompt", "import", "--max-new-tokens", "2"]
    text = " ".join(run(*arguments, "--device", "cpu").output.split())
    assert "dense" in text and "tokens/s" in text and "the tokens of dense and sparse agree" in text
    assert "multiplied by the reference backend" in text and "correct, not fast" in text
    alone = last_json(run(*arguments, "--device", "cpu", "--sparse-only", "--keep-dense", "--json"))
    assert list(alone["runs"]) == ["sparse"] and alone["same_tokens"] is None
    assert "the prompt is empty" in run("generate", str(pruned), "--prompt", "").stderr
    refused = run(
        "generate", DEMO, "--prompt", "import", "--max-new-tokens", "1", "--device", "cpu"
    )
    assert refused.exit_code == 1 and "can be sparse" in refused.stderr


def test_advise_labels_its_limits() -> None:
    text = " ".join(run("advise", DEMO, "--device", "cpu").output.split())
    assert "192x512" in text and "nothing can be measured here" in text
    assert "limits, not speed-ups" in text and "left dense: lm_head" in text
    result = last_json(run("advise", DEMO, "--tokens", "1,8", "--device", "cpu", "--json"))
    assert result["tokens"] == [1, 8]
    assert "whole numbers" in run("advise", DEMO, "--tokens", "few").stderr
