"""What runs in processes of its own: the HTTP server, on two ranks, and the benchmark."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed here: see `make test-vllm`")

ROOT = Path(__file__).resolve().parents[2]
START_SECONDS = 500


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def request(url: str, body: dict[str, Any] | None = None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, data, headers), timeout=120) as answer:
        text = answer.read()
    return json.loads(text) if text else None


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + START_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-4000:]
        try:
            request(url)
            return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(1)
    raise AssertionError(f"no answer in {START_SECONDS} s: {log.read_text()[-4000:]}")


def test_the_server_answers_on_two_ranks(
    model: Callable[..., Path],
    expected: Callable[[Path], list[list[int]]],
    prompts: list[list[int]],
    tmp_path: Path,
) -> None:
    path, port, log = model("qwen2", "mixed"), free_port(), tmp_path / "log"
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(path)]
    command += ["--port", str(port), "--host", "127.0.0.1", "--tensor-parallel-size", "2"]
    command += ["--dtype", "float32", "--max-model-len", "128", "--max-num-seqs", "8"]
    command += ["--enforce-eager", "--served-model-name", "sparse"]
    # Two ranks need a core each to be bound to; where there is one, both have it.
    cores = sorted(os.sched_getaffinity(0))
    binding = f"{cores[0]}|{cores[-1]}"
    environment = os.environ | {"VLLM_CPU_OMP_THREADS_BIND": binding}
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/health", process, log)
            body = {"model": "sparse", "prompt": prompts, "max_tokens": 24, "temperature": 0}
            body |= {"ignore_eos": True, "return_token_ids": True}
            answer = request(f"http://127.0.0.1:{port}/v1/completions", body)
        finally:
            os.killpg(process.pid, signal.SIGTERM)
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    assert [choice["token_ids"] for choice in choices] == expected(path)
    assert all(choice["text"] for choice in choices)
    assert log.read_text().count("6 of 8 linear layers run sparse") == 1, "one rank says it"


def test_the_benchmark_runs(tmp_path: Path) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "benchmarks/bench_vllm.py", "--quick"),
            *("--out", str(tmp_path), "--iterations", "1"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result["summary"]) == {"decode_b1", "prefill", "throughput"}
    assert 1 < result["limits"]["decode_b1"] < 16 / 9
    assert result["error"] < 0.02
    assert json.loads((tmp_path / "vllm.json").read_text()) == result
    assert (tmp_path / "vllm.png").stat().st_size > 1000
