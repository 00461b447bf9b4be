"""What the compiler makes of the kernels, for GPUs that are not there: compiling needs no GPU.

Memory-bound kernels live from 16-byte accesses, from values that stay in the thread that loaded
them, and from registers that do not spill. All three show in the compiler's output.
"""

from __future__ import annotations

import importlib
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
from proxsparse.kernels.launch import BLOCK, NUM_WARPS, UPDATE_BLOCK, UPDATE_NUM_WARPS

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile"
)

# Capabilities of the A100, the H100/H200 and the B200.
TARGETS = (80, 90, 100)
INTEGERS = ("n", "K", "M", "N", "num_bytes")  # multiples of 16 here
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
UPDATE = {"STEPS": 2, "VECTOR": 8, "BLOCK": UPDATE_BLOCK}
MIXED = {"STEPS": 3, "VECTOR": 4, "BLOCK": UPDATE_BLOCK}
EXACT = {"VECTOR": 8, "BLOCK": BLOCK}


def variant(
    stem: str,
    pointers: str,
    constants: dict[str, Any],
    wide: tuple[int, int],
    *,
    device_scalars: bool = False,
) -> Any:
    """A kernel, the dtypes behind its pointers, its 16-byte loads and stores per thread."""
    types = dict(pair.split(":") for pair in pointers.split())
    name = "-".join((stem, *dict.fromkeys(types.values())))
    return pytest.param(stem, types, constants, wide, device_scalars, id=name)


ADAMW = {"w0_ptr": None, "master_ptr": None, "seed": None}
GATE = {"ROW_SPANS_TILE": True, "scales_ptr": None}
VARIANTS = (
    variant("prox_2to4", "z:bf16 w:bf16", UPDATE | {"BLOCK": BLOCK}, (1, 1)),
    variant("prox_2to4", "z:fp32 w:fp32", MIXED | {"BLOCK": BLOCK}, (2, 2)),
    variant("prox_adamw", "p:bf16 grad:bf16 m:bf16 v:bf16", UPDATE | ADAMW, (4, 3)),
    variant("prox_adamw", "p:bf16 grad:bf16 m:fp32 v:fp32", MIXED | ADAMW, (4, 4)),
    variant("prox_adamw", "p:fp32 grad:fp32 m:fp32 v:fp32", MIXED | ADAMW, (8, 6)),
    variant(
        "prox_adamw",
        "p:bf16 grad:bf16 m:fp32 v:fp32 w0:bf16 master:fp32",
        MIXED | {"seed": None},
        (6, 6),
        device_scalars=True,
    ),
    variant(
        "gate_update",
        "s:bf16 grad:bf16 w0:bf16 m:bf16 v:bf16 norm:fp32 out:bf16",
        UPDATE | GATE | {"HARD": False},
        (7, 4),
        device_scalars=True,
    ),
    variant(
        "gate_update",
        "s:fp32 grad:bf16 w0:bf16 m:fp32 v:fp32 norm:fp32",
        MIXED | GATE | {"HARD": False, "out_ptr": None},
        (8, 6),
    ),
    variant(
        "gate_project",
        "s:bf16 w0:bf16 norm:fp32 out:bf16",
        EXACT | {"ROW_SPANS_TILE": True},
        (4, 1),
    ),
    variant("project_2to4", "w:i16 out:i16", EXACT | {"score_ptr": None}, (1, 1)),
    variant("mask_2to4", "score:i16 out:u8", EXACT, (1, 0)),
    variant(
        "quantize_fp8",
        "w:bf16 values:u8 scale:fp32",
        {"scale_in_ptr": None, "BLOCK": 2048},
        (2, 1),
    ),
    variant("is_2to4", "w:i16 result:u8", EXACT, (1, 0)),
    variant("pack_2to4", "w:i16 values:i16 codes:u8", {"PADDED": False, "BLOCK": BLOCK}, (1, 0)),
    variant(
        "unpack_2to4",
        "values:i16 codes:u8 out:i16",
        {"PADDED": False, "TILED": False, "BLOCK": BLOCK},
        (0, 1),
    ),
)


def compile_kernel(
    stem: str,
    types: dict[str, str],
    constants: dict[str, Any],
    device_scalars: bool,
    capability: int,
) -> Any:
    """Compiles as a launch on aligned tensors of a multiple of 16 elements would."""
    kernel = getattr(importlib.import_module(f"proxsparse.kernels.{stem}"), f"_{stem}_kernel")
    pointers = {f"{name}_ptr": f"*{dtype}" for name, dtype in types.items()}
    signature, aligned = {}, {}
    for index, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in pointers or name in INTEGERS:
            signature[name] = pointers.get(name, "i32")
            aligned[(index,)] = [["tt.divisibility", 16]]
        elif name == "seed":
            signature[name] = "i64"
        else:
            on_device = device_scalars and name in ("step", "lr", "lam", "grad_scale")
            signature[name] = "*fp32" if on_device else "fp32"
    source = triton.compiler.ASTSource(
        fn=kernel, signature=signature, constexprs=constants, attrs=aligned
    )
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    num_warps = UPDATE_NUM_WARPS if constants.get("BLOCK") == UPDATE_BLOCK else NUM_WARPS
    return triton.compile(source, target=target, options={"num_warps": num_warps})


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("stem, types, constants, wide, device_scalars", VARIANTS)
def test_compiled_kernel(
    stem: str,
    types: dict[str, str],
    constants: dict[str, Any],
    wide: tuple[int, int],
    device_scalars: bool,
    capability: int,
    tmp_path: Path,
) -> None:
    compiled = compile_kernel(stem, types, constants, device_scalars, capability)
    assert "ttg.convert_layout" not in compiled.asm["ttgir"]

    loads, stores = (
        len(re.findall(rf"{access}\.global[.\w:]*\.v4\.b32", compiled.asm["ptx"]))
        for access in ("ld", "st")
    )
    assert (loads, stores) == wide
    if constants["BLOCK"] == UPDATE_BLOCK:
        assert "bar.sync" not in compiled.asm["ptx"]  # warps need not wait for each other

    assert stack_bytes(compiled, tmp_path) == 0


def stack_bytes(compiled: Any, folder: Path) -> int:
    """Bytes of stack of a thread: that is where spilled registers live."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])
    usage = subprocess.run(
        [TOOLS / "cuobjdump", "-res-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    (stack,) = re.findall(r"STACK:(\d+)", usage)
    return int(stack)


@pytest.mark.parametrize("capability", TARGETS)
@pytest.mark.parametrize("tokens", [1, 16, 64])
def test_decode_compiles_without_spills(tokens: int, capability: int, tmp_path: Path) -> None:
    """It feeds a matrix product, so unlike above its values must change layout."""
    constants = {"TOKENS": tokens, "BLOCK_N": 16, "BLOCK_K": 256}
    types = dict.fromkeys(("x", "values", "bias", "y"), "bf16") | {"codes": "u8"}
    compiled = compile_kernel("sparse_linear_decode", types, constants, False, capability)
    assert stack_bytes(compiled, tmp_path) == 0
