"""Writes api.md: every public name with its signature, what its docstring says, and one example.

    python docs/make_api.py [--check]

tests/test_documents.py runs the examples, in the order of the page, and holds that the page is what
this script writes.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
import sys
from pathlib import Path
from typing import Any

import proxsparse

PAGE = Path(__file__).with_name("api.md")

# What the examples start from; the test runs it too.
SETUP = """\
from pathlib import Path

import proxsparse
from transformers import AutoModelForCausalLM, AutoTokenizer

demo = Path(proxsparse.__file__).with_name("demo_model")
model = AutoModelForCausalLM.from_pretrained(demo, dtype="auto")
tokenizer = AutoTokenizer.from_pretrained(demo)
"""

# Heading -> name -> example. The examples run one after the other, with the names of those before.
SECTIONS: dict[str, dict[str, str]] = {
    "Prune": {
        "prune": """\
result = proxsparse.prune(demo, "demo-2to4", method="magnitude")
print(result.report["layers"][0])
""",
        "PruneResult": """\
result.masks.save("proxsparse.masks")
print(result.report["recipe"]["method"], result.history)
""",
        "recover": """\
texts = ["def add(a, b):\\n    return a + b\\n" * 100]
short = {"steps": 2, "batch_size": 1, "max_seq_length": 64}
result = proxsparse.recover("demo-2to4", demo, calibration=texts, **short)
print(result.report["recovered_from"]["id"], result.report["weights_updated"])
""",
        "learn_masks": """\
texts = ["def add(a, b):\\n    return a + b\\n" * 100]
masks = proxsparse.learn_masks(model, texts, tokenizer, steps=2, batch_size=1, max_seq_length=64)
""",
    },
    "Masks": {
        "Masks": """\
masks.save("learned.safetensors")
masks = proxsparse.Masks.load("learned.safetensors")
print(masks["model.layers.0.mlp.up_proj.weight"].shape)
""",
        "apply_masks_": "proxsparse.apply_masks_(model, masks)\n",
        "masks_of": """\
assert set(proxsparse.masks_of(model)) == set(masks)
""",
        "keep_masks_": """\
import torch

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
handle = proxsparse.keep_masks_(model, optimizer)
...  # train on; pruned weights are zero again after each step
handle.remove()
""",
        "check_masks": "proxsparse.check_masks(model, masks)  # else it raises\n",
        "mask_callback": """\
callbacks = [proxsparse.mask_callback()]  # of transformers.Trainer, or trl's
""",
    },
    "Run": {
        "sparsify_": """\
report = proxsparse.sparsify_(model)
print(len(report.sparse), report.bytes / report.dense_bytes, report.left_dense)
""",
        "densify_": 'print(len(proxsparse.densify_(model)), "layers are dense again")\n',
        "SparseLinear": """\
up = model.model.layers[0].mlp.up_proj
layer = proxsparse.SparseLinear.from_linear(up)
assert torch.equal(layer.to_linear().weight, up.weight)
""",
    },
    "Packed models": {
        "pack": """\
result = proxsparse.pack("demo-2to4", "demo-packed")
print(result["packed_bytes"] / result["dense_bytes"])
""",
        "unpack": 'proxsparse.unpack("demo-packed", "demo-unpacked")\n',
        "generate": """\
result = proxsparse.generate("demo-packed", "import", max_new_tokens=2, device="cpu")
print(result["runs"]["sparse"]["text"])
""",
        "merge_and_pack": """\
import peft

packed = AutoModelForCausalLM.from_pretrained("demo-packed", dtype="auto")
adapted = peft.get_peft_model(packed, peft.LoraConfig(target_modules="all-linear"))
...  # train it
packed, report = proxsparse.merge_and_pack(adapted)
print(report)
""",
    },
    "Measure": {
        "inspect_model": """\
print(proxsparse.inspect_model("demo-2to4")["num_2to4"])
""",
        "advise": """\
print(proxsparse.advise(demo, tokens=(1, 4096), device="cpu")["model"])
""",
        "evaluate_models": """\
Path("text.txt").write_text(texts[0])
config = proxsparse.EvalConfig(data="text.txt", max_seq_length=64, device="cpu")
print(proxsparse.evaluate_models([demo, "demo-2to4"], config))
""",
        "evaluate_perplexity": """\
print(proxsparse.evaluate_perplexity(model, texts[0], tokenizer, max_seq_length=64))
""",
    },
    "Settings": {
        "CalibrationConfig": """\
settings = proxsparse.CalibrationConfig(calibration="stdlib", max_seq_length=256)
print(settings.max_seq_length)
""",
        "TargetConfig": 'print(proxsparse.TargetConfig(ignore=("down_proj",)).ignore)\n',
        "LearnConfig": 'print(proxsparse.LearnConfig(steps=200, memory="balanced").lr)\n',
        "RunConfig": 'print(proxsparse.RunConfig(device="cpu").dtype)\n',
        "EvalConfig": 'print(proxsparse.EvalConfig(tasks=("arc_easy",), limit=100).batch_size)\n',
        "GatesConfig": """\
config = proxsparse.GatesConfig(steps=2, batch_size=1, max_seq_length=64)
masks = proxsparse.learn_masks(model, texts, tokenizer, config=config)
""",
        "ProxSparseConfig": "print(proxsparse.ProxSparseConfig(lam=0.25).given())\n",
        "MaskLLMConfig": "print(proxsparse.MaskLLMConfig(steps=2000).given())\n",
        "SparseGPTConfig": "print(proxsparse.SparseGPTConfig(mask_only=True).given())\n",
        "WandaConfig": """\
config = proxsparse.WandaConfig(num_calibration_samples=1, max_seq_length=64)
print(proxsparse.learn_masks(model, texts, tokenizer, config=config))
""",
        "MagnitudeConfig": """\
print(proxsparse.learn_masks(model, config=proxsparse.MagnitudeConfig()))
""",
    },
    "Errors": {
        "ProxsparseError": """\
try:
    proxsparse.prune(demo, "demo-2to4", method="magnitude")
except proxsparse.ProxsparseError as error:
    print(error)  # demo-2to4 exists and is not empty: ...
""",
        "Interrupted": """\
try:
    proxsparse.prune(demo, "demo-again", method="magnitude", resume=True)
except proxsparse.Interrupted:
    print("run it once more with resume=True")
""",
    },
}

INTRODUCTION = f"""\
# Python API

`docs/make_api.py` writes this page from the package. Every name here is `proxsparse.NAME`; what is
not here may change without notice. The examples run in this order, after

```python
{SETUP}```

The fields of the config classes are also the keyword arguments of `prune` and `learn_masks`, and
the flags of the command line: `max_seq_length=256` is `--max-seq-length 256`.
"""

_OF_TORCH = ("forward", "extra_repr")  # methods that torch calls, not people
_SECTION = re.compile(r"(Args|Attributes|Returns|Raises|Cost|Source):\s*(.*)")
_ITEM = re.compile(r"(\*{0,2}[\w., ]+?): (.*)")


def page() -> str:
    """The whole page."""
    parts = [INTRODUCTION]
    for heading, examples in SECTIONS.items():
        parts.append(f"## {heading}\n")
        parts += [entry(name, example) for name, example in examples.items()]
    return "\n".join(parts)


def entry(name: str, example: str) -> str:
    """One name: signature, description, example."""
    thing = getattr(proxsparse, name)
    parts = [f"### {name}\n", f"```text\n{signature(name, thing)}\n```\n"]
    parts.append(markdown(inspect.getdoc(thing) or ""))
    if dataclasses.is_dataclass(thing) and name.endswith("Config"):
        parts.append(fields(thing))
    elif inspect.isclass(thing) and not issubclass(thing, Exception):
        parts.append(methods(thing))
    parts.append(f"```python\n{example}```\n")
    return "\n".join(filter(None, parts))


def signature(name: str, thing: Any) -> str:
    """How it is called, one parameter a line where it does not fit into one."""
    if inspect.isclass(thing) and issubclass(thing, Exception):
        bases = ", ".join(base.__name__ for base in thing.__bases__)
        return f"class {name}({bases})"
    if dataclasses.is_dataclass(thing) and name.endswith("Config"):
        return f"class {name}(...)"
    found = inspect.signature(thing)
    parameters, keyword_only = [], False
    for parameter in found.parameters.values():
        if parameter.kind is parameter.KEYWORD_ONLY and not keyword_only:
            parameters.append("*")
            keyword_only = True
        parameters.append(_parameter(parameter))
    returns = found.return_annotation
    arrow = "" if returns is found.empty or inspect.isclass(thing) else f" -> {returns}"
    kind = "class " if inspect.isclass(thing) else ""
    line = f"{kind}{name}({', '.join(parameters)}){arrow}"
    if len(line) <= 80:
        return line
    listed = "".join(f"    {parameter},\n" for parameter in parameters)
    return f"{kind}{name}(\n{listed}){arrow}"


def _parameter(parameter: inspect.Parameter) -> str:
    star = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
    text = f"{star}{parameter.name}: {parameter.annotation}"
    if parameter.default is parameter.empty:
        return text
    factory = type(parameter.default).__module__ == "dataclasses"
    return f"{text} = {'...' if factory else repr(parameter.default)}"


def methods(thing: type[Any]) -> str:
    """A line for each method of its own: name, parameters, first sentence."""
    lines = []
    for name, member in vars(thing).items():
        function = getattr(member, "__func__", getattr(member, "fget", member))
        if name.startswith("_") or not inspect.isfunction(function) or name in _OF_TORCH:
            continue
        is_property = isinstance(member, property)
        parameters = [p for p in inspect.signature(function).parameters if p not in ("self", "cls")]
        call = name if is_property else f"{name}({', '.join(parameters)})"
        lines.append(f"- `{call}`: {first_paragraph(inspect.getdoc(member) or '')}")
    return "**Methods**\n\n" + "\n".join(lines) + "\n" if lines else ""


def fields(thing: Any) -> str:
    """The fields of a config class as a table; of one made of others, which those are."""
    made_of = [base.__name__ for base in thing.__bases__ if base.__name__.endswith("Config")]
    if made_of:
        parts = [proxsparse.CalibrationConfig, proxsparse.LearnConfig]
        parts += [proxsparse.TargetConfig, proxsparse.RunConfig]
        names = [f"`{part.__name__}`" for part in parts if issubclass(thing, part)]
        known = {field.name for part in parts for field in dataclasses.fields(part)}
        own = [f"`{f.name}`" for f in dataclasses.fields(thing) if f.name not in known]
        text = f"Its fields are those of {', '.join(names)}"
        return text + (f", and {', '.join(own)}.\n" if own else ".\n")
    rows = ["| field | type | default | what it is |", "|---|---|---|---|"]
    for field in dataclasses.fields(thing):
        kind = str(field.type).replace(" | ", " or ")  # a bar would end the cell
        cells = (f"`{field.name}`", f"`{kind}`", f"`{field.default!r}`", field.metadata["help"])
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows) + "\n"


def first_paragraph(text: str) -> str:
    """Up to the first blank line, in one line."""
    return " ".join(text.split("\n\n")[0].split())


def markdown(docstring: str) -> str:
    """A Google-style docstring as Markdown: sections as bold words, their items as lists."""
    out: list[str] = []
    section = False
    for line in docstring.splitlines():
        found = _SECTION.fullmatch(line)
        if found:
            section = not found[2]
            out += [f"**{found[1]}:** {found[2]}".rstrip(), *([""] if section else [])]
            continue
        if line and not line.startswith(" "):
            section = False
        out.append(_in_section(line) if section else line)
    return "\n".join(out).strip() + "\n"


def _in_section(line: str) -> str:
    depth = len(line) - len(line.lstrip())
    text = line.strip()
    item = _ITEM.fullmatch(text) if depth == 4 else None
    if item:
        return f"- `{item[1]}`: {item[2]}"
    return f"{' ' * max(depth - 6, 0)}{text}" if depth > 4 else text


def main() -> None:
    """Write the page, or say that it is stale."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail if it is stale")
    args = parser.parse_args()
    if args.check:
        if PAGE.read_text(encoding="utf-8") != page():
            sys.exit(f"{PAGE.name} is stale: run python docs/make_api.py")
        return
    PAGE.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
