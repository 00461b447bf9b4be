"""The model card of a result: README.md, with the metadata that the Hugging Face Hub reads.

It says what `proxsparse.json` says, in words: where the model comes from, how it was pruned, what
that cost, how to load it. The card of the base model lies beside it as README.base.md, so that
nothing of it gets lost, and its licence and languages are taken over.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from proxsparse.models.files import looks_like_path, write_text_whole
from proxsparse.models.forms import read_report

CARD = "README.md"
BASE_CARD = "README.base.md"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")
_TAKEN_OVER = ("license", "license_name", "license_link", "language")


def write_card(
    directory: Path, report: Mapping[str, Any], source: Path, *, is_same_model: bool = False
) -> None:
    """Write the card of a result.

    Args:
        directory: the result.
        report: what its `proxsparse.json` says.
        source: the directory of the model that it was made from.
        is_same_model: whether that is the same model in another form, whose card, if it was edited
            since we wrote it, goes on to serve; else it is kept as the card of the base model.
    """
    found, base = source / CARD, source / BASE_CARD
    if found.is_file() and not _is_ours(found, source):
        if is_same_model:
            shutil.copyfile(found, directory / CARD)
            return
        if source != directory:
            shutil.copyfile(found, directory / BASE_CARD)
        base = found
    name = _title(found) if is_same_model and found.is_file() else ""
    name = name or directory.name.removesuffix(".partial")
    text = render_card(report, _metadata(base), name)
    write_text_whole(directory / CARD, text)


def _is_ours(card: Path, directory: Path) -> bool:
    """Whether a card is word for word what we wrote for the report beside it."""
    report = read_report(directory)
    text = card.read_text(encoding="utf-8", errors="replace")
    metadata = _metadata(directory / BASE_CARD)
    return report is not None and text == render_card(report, metadata, _title(card))


def _title(card: Path) -> str:
    """The first heading of a card; empty where there is none."""
    lines = card.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line[2:] for line in lines if line.startswith("# ")), "")


def render_card(report: Mapping[str, Any], base_metadata: Mapping[str, Any], name: str) -> str:
    """The text of a card.

    Args:
        report: what `proxsparse.json` says.
        base_metadata: of the base model's card.
        name: what the result is called.
    """
    from huggingface_hub import EvalResult, ModelCardData

    base = report.get("base", {})
    base_id = str(base.get("id") or "a dense model")
    is_on_hub = bool(_HUB_NAME.fullmatch(base_id)) and not looks_like_path(base_id)
    is_on_hub = is_on_hub and bool(base.get("revision"))
    recipe = report.get("recipe", {})
    method = recipe.get("method", "")
    quality = report.get("quality")
    packed = report.get("storage") == "packed"
    results = None
    if quality:
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type="held-out",
                dataset_name=f"held-out blocks of {quality['source']}",
                metric_type="perplexity",
                metric_value=round(quality["perplexity"], 4),
            )
        ]
    data = ModelCardData(
        base_model=base_id if is_on_hub else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["proxsparse", "2:4", "sparse", "pruned", *([method] if method else [])],
        model_name=name if results else None,
        eval_results=results,
        **{key: base_metadata[key] for key in _TAKEN_OVER if key in base_metadata},
    )
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}",
        f"{_linked(base_id, is_on_hub)} with {len(report.get('layers', []))} linear layers pruned "
        "to 2:4: of every four neighbouring weights two are exactly zero"
        + (", and only the other two are stored." if packed else "."),
        "## How it was made\n\n" + _made(report, recipe, method),
        "## What it costs\n\n" + _cost(quality),
        "## How to load it\n\n" + (_PACKED if packed else _DENSE),
    ]
    if (left := report.get("left_dense")) and len(left) <= 40:
        parts.append("## Left dense\n\n" + "\n".join(f"- `{k}`: {v}" for k, v in left.items()))
    return "\n\n".join(parts) + "\n"


def _linked(base_id: str, is_on_hub: bool) -> str:
    return f"[{base_id}](https://huggingface.co/{base_id})" if is_on_hub else f"`{base_id}`"


def _made(report: Mapping[str, Any], recipe: Mapping[str, Any], method: str) -> str:
    version = report.get("versions", {}).get("proxsparse", "")
    rows = {"made with": f"proxsparse {version}".strip(), "method": method}
    if report.get("data"):
        rows["calibration text"] = f"{report['data']['tokens']:,} tokens of "
        rows["calibration text"] += report["data"]["source"]
    for key in ("steps", "batch_size", "max_seq_length", "lr", "lam", "seed"):
        if recipe.get(key) is not None:
            rows[key.replace("_", " ")] = f"{recipe[key]:,}"
    if report.get("weights_updated"):
        rows["kept weights"] = "updated by the method"
    elif "weights_updated" in report:
        rows["kept weights"] = "bitwise those of the base model"
    table = "| | |\n|---|---|\n" + "\n".join(f"| {k} | {v} |" for k, v in rows.items() if v)
    return table + "\n\nAll settings are in `proxsparse.json`."


def _cost(quality: Mapping[str, Any] | None) -> str:
    if not quality:
        return "Not measured when it was made."
    return (
        "| | dense | pruned |\n|---|---|---|\n"
        f"| perplexity | {quality['perplexity_dense']:.2f} | {quality['perplexity']:.2f} |\n\n"
        f"On {quality['tokens']:,} tokens of {quality['source']} that the masks were not chosen on."
    )


_CODE = """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{path}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{path}")
```"""
_DENSE = (
    "It is an ordinary checkpoint with zeros, which every program that reads Hugging Face models "
    "loads and serves, at the speed of the dense model:\n\n"
    + _CODE.format(path="PATH_OR_NAME")
    + "\n\nTo store and run only what is not zero: `proxsparse pack PATH_OR_NAME --output PACKED`."
)
_PACKED = (
    "Where proxsparse is installed (`pip install proxsparse`), transformers loads it as a sparse "
    "model:\n\n"
    + _CODE.format(path="PATH_OR_NAME")
    + "\n\nFor any other program: `proxsparse unpack PATH_OR_NAME --output DENSE` gives the "
    "ordinary checkpoint with zeros again, bit by bit."
)


def _metadata(card: Path) -> dict[str, Any]:
    """The metadata of a card that somebody else wrote; empty where there is none, or no sound one.

    A licence that cannot be read is in the card itself, which is kept.
    """
    if not card.is_file():
        return {}
    from huggingface_hub import metadata_load

    try:
        found = metadata_load(card)
    except Exception:  # YAML of a stranger
        return {}
    return dict(found) if isinstance(found, dict) else {}
