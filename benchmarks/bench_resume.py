"""A run that is killed in the middle and resumed, against runs that nobody disturbed.

    python benchmarks/bench_resume.py --model DIR --data DIR [--steps 400] [--out DIR]

DATA holds calibration.txt and heldout.txt. The same job runs twice undisturbed, which shows how far
apart two runs of a GPU are, and once with SIGKILL after its first checkpoint past the middle; the
resumed run is compared with the first in masks and in perplexity. On a CPU all three agree bit by
bit. Each run is `proxsparse.prune` in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from harness import describe_run, results_directory

from proxsparse import Masks
from proxsparse.data.sources import read_text
from proxsparse.data.tokenizing import to_blocks, tokenize_text
from proxsparse.jobs.evaluate import evaluate_perplexity
from proxsparse.models.loading import load_model, resolve_device

CODE = """
import json, sys
import proxsparse
model, output, settings = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
proxsparse.prune(model, output, **settings)
"""


def start(model: str, output: Path, settings: dict[str, Any]) -> subprocess.Popen[bytes]:
    """Begin a job in a process of its own."""
    command = [sys.executable, "-c", CODE, model, str(output), json.dumps(settings)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def finish(process: subprocess.Popen[bytes]) -> None:
    """Wait for a job, which must end well."""
    if process.wait():
        raise SystemExit(f"a run ended with exit code {process.returncode}")


def kill_after(process: subprocess.Popen[bytes], output: Path, step: int) -> int:
    """SIGKILL once there is a checkpoint of `step` or later; returns the latest one's step."""
    folder = output.with_name(output.name + ".partial") / "checkpoints"
    while True:
        if process.poll() is not None:
            raise SystemExit(f"the run ended before step {step} was saved: give it more --steps")
        done = [int(path.stem.removeprefix("step-")) for path in folder.glob("step-*.safetensors")]
        if done and max(done) >= step:
            process.send_signal(signal.SIGKILL)
            process.wait()
            return max(done)
        time.sleep(0.002)


def agreement(a: Masks, b: Masks) -> float:
    """The share of the weights that both keep or both prune."""
    same = sum(int((a[name] == b[name]).sum()) for name in a)
    return same / sum(a[name].numel() for name in a)


def main() -> None:
    """Run the three jobs, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="directory of a dense causal LM")
    parser.add_argument("--data", required=True, type=Path, help="directory of the two texts")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--checkpoint-every", type=int, default=50)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=None, help="default: benchmarks/results/<gpu>")
    args = parser.parse_args()
    settings = {
        "calibration": str(args.data / "calibration.txt"),
        "steps": args.steps,
        "batch_size": args.batch_size,
        "checkpoint_every": args.checkpoint_every,
        "device": args.device,
    }
    device = resolve_device(args.device)
    named = {**settings, "calibration": "calibration.txt", "model": Path(args.model).name}
    result: dict[str, Any] = {**describe_run(), "settings": named}
    with tempfile.TemporaryDirectory() as folder:
        outputs = {name: Path(folder) / name for name in ("undisturbed", "again", "resumed")}
        for name in ("undisturbed", "again"):
            finish(start(args.model, outputs[name], settings))
        killed = start(args.model, outputs["resumed"], settings)
        result["killed_after_checkpoint"] = kill_after(killed, outputs["resumed"], args.steps // 2)
        finish(start(args.model, outputs["resumed"], {**settings, "resume": True}))
        masks = {name: Masks.load(path) for name, path in outputs.items()}
        perplexities = {}
        for name, path in outputs.items():
            loaded = load_model(path, device)
            text = tokenize_text(read_text(args.data / "heldout.txt"), loaded.tokenizer)
            perplexities[name] = evaluate_perplexity(loaded.model, to_blocks(text, 512))
    first = masks["undisturbed"]
    result["summary"] = {
        "masks_again": round(agreement(first, masks["again"]), 5),
        "masks_resumed": round(agreement(first, masks["resumed"]), 5),
        **{f"heldout_{name}": round(value, 3) for name, value in perplexities.items()},
    }
    out = args.out or results_directory()
    out.mkdir(parents=True, exist_ok=True)
    (out / "resume.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
