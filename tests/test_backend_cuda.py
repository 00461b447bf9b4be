"""The CUDA backend: finding cuSPARSELt anywhere; its numbers, streams, graphs, threads on a GPU."""

from __future__ import annotations

import contextlib
import importlib
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from proxsparse import ops
from proxsparse.backends import choice, table
from proxsparse.errors import ProxsparseError
from proxsparse.ops import dispatch, reference
from proxsparse.tuning import tune

cusparselt = pytest.importorskip(
    "proxsparse.backends.cusparselt", reason="the extension was not built"
)
executors = pytest.importorskip("proxsparse.backends.executors", reason="not built")
stream_memory = pytest.importorskip("proxsparse.backends.stream_memory", reason="not built")
backend_cuda = pytest.importorskip("proxsparse.backends.cuda", reason="the extension was not built")

ROOT = Path(__file__).parents[1]
HEADER = (ROOT / "csrc/cuda/cusparselt_api.h").read_text(encoding="utf-8")


@pytest.mark.parametrize("op", ["sparse_linear", "sparse_linear_group", "compress_2to4"])
def test_the_backend_has_its_ops(op: str) -> None:
    assert callable(dispatch.implementation(op, "cuda"))


@pytest.mark.parametrize(
    ("has_kernels", "capability", "expected"),
    [(True, (9, 0), 64), (True, (8, 0), 16), (True, (10, 0), 16), (False, (9, 0), 0)],
)
def test_few_tokens_are_preferred_unseen_where_they_were_seen_to_win(
    has_kernels: bool, capability: tuple[int, int], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend_cuda._cuda, "has_kernels", has_kernels)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert backend_cuda._decode_beats_dense_up_to.__wrapped__(0) == expected


# -- finding the library


def real_library() -> str:
    """The path of an installed cuSPARSELt; skips without one."""
    path = next(filter(os.path.isfile, cusparselt.candidates()), None)
    if path is None:
        pytest.skip("no cuSPARSELt is installed; PROXSPARSE_CUSPARSELT can name one")
    if "too old" in load(path):
        pytest.skip(f"{path} is too old")
    return path


def load(path: str | Path | None, code: str = "print(cusparselt.library())") -> str:
    """Output of a new process that loads the library; the extension loads one per process."""
    environment = {**os.environ}
    environment.pop("PROXSPARSE_CUSPARSELT", None)
    if path is not None:
        environment["PROXSPARSE_CUSPARSELT"] = str(path)
    command = [sys.executable, "-c", f"from proxsparse.backends import cusparselt\n{code}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    return done.stdout + done.stderr


def make_library(folder: Path, source: str, name: str = "libcusparseLt.so.0") -> Path:
    """A shared library of these C functions, by default called as cuSPARSELt is."""
    compiler = os.environ.get("CC", "cc")
    path = folder / name
    try:
        subprocess.run(
            [compiler, "-shared", "-fPIC", "-x", "c", "-", "-o", str(path)],
            input=source,
            text=True,
            check=True,
        )
    except FileNotFoundError:
        pytest.skip("no C compiler")
    return path


def versioned(major: int, minor: int, patch: int) -> str:
    values = f"{{{major}, {minor}, {patch}}}"
    return (
        f"int cusparseLtGetProperty(int which, int *value) {{ static int v[] = {values}; "
        "*value = v[which]; return 0; }"
    )


def test_a_named_file_is_the_only_one_tried(tmp_path: Path) -> None:
    output = load(tmp_path / "nothing.so")
    assert "ProxsparseError: cuSPARSELt cannot be loaded" in output
    assert "nothing.so: cannot open shared object file" in output
    assert "name the file in PROXSPARSE_CUSPARSELT" in output
    assert output.count("cannot open") == 1


def test_a_library_that_is_too_old_is_refused(tmp_path: Path) -> None:
    path = make_library(tmp_path, versioned(0, 7, 1))
    output = load(path)
    assert f"{path} is cuSPARSELt 0.7.1: too old, 0.8.0 or later is needed" in output


def test_a_library_without_the_functions_is_refused(tmp_path: Path) -> None:
    assert "has no function cusparseLtInit" in load(make_library(tmp_path, versioned(0, 8, 1)))
    (tmp_path / "other").mkdir()
    other = make_library(tmp_path / "other", "int hello(void) { return 1; }")
    assert "has no function cusparseLtGetProperty" in load(other)


@pytest.mark.parametrize("layout", ["nvidia/cu13/lib", "nvidia/cusparselt/lib"])
def test_both_layouts_of_the_wheel_are_found(
    layout: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / layout / "libcusparseLt.so.0"
    path.parent.mkdir(parents=True)
    path.write_text("")
    monkeypatch.delenv("PROXSPARSE_CUSPARSELT", raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert str(path) in list(cusparselt.candidates())
    assert list(cusparselt.candidates())[-1] == "libcusparseLt.so.0", "the system's loader"


def test_a_loaded_copy_is_found(tmp_path: Path) -> None:
    path = make_library(tmp_path, versioned(0, 8, 1))
    code = f"import ctypes\nctypes.CDLL({str(path)!r})\nprint(*cusparselt.candidates())"
    assert str(path) in load(None, code)


def test_the_real_library_loads_and_tells_its_version() -> None:
    """Loading resolves every function that is used."""
    output = load(real_library())
    assert re.search(r"Library\(path='.*', version=\(\d+, \d+, \d+\)\)", output), output


def test_a_second_library_is_refused(tmp_path: Path) -> None:
    code = (
        "cusparselt.library()\n"
        "cusparselt.extension.load_cusparselt(cusparselt.library().path)\n"
        "cusparselt.extension.load_cusparselt('/nowhere/libcusparseLt.so.0')"
    )
    assert "cuSPARSELt is already loaded from" in load(real_library(), code)


def test_launching_before_loading_is_an_error() -> None:
    code = (
        "run = cusparselt.extension.SparseLinear(0, 0, 64, 64, False, -1, 1, 0, False)\n"
        "run(8, 0, 0, 0, 0, 0, 0, 0, 0)"
    )
    assert re.search(
        "RuntimeError: (no CUDA driver|cuSPARSELt was not loaded|cuCtx)", load(None, code)
    )


def test_the_version_with_a_known_regression_is_named() -> None:
    assert "0.8.1" in cusparselt.version_warning((0, 8, 0), (9, 0))
    assert not cusparselt.version_warning((0, 8, 1), (9, 0))
    assert not cusparselt.version_warning((0, 8, 0), (8, 0))


def test_python_and_cpp_mean_the_same_by_the_librarys_choice() -> None:
    assert cusparselt.extension.LIBRARY_CHOICE == choice.LIBRARY_CHOICE


def enumerators(header: str) -> dict[str, int]:
    """Values of the enumerators in C source."""
    values = {}
    source = re.sub(r"//.*", "", header)
    for body in re.findall(r"typedef enum\s*\w*\s*\{(.*?)\}", source, re.S):
        value = -1
        for item in filter(None, (part.strip() for part in body.split(","))):
            name, _, given = (part.strip() for part in item.partition("="))
            value = int(given, 0) if given else value + 1
            values[name] = value
    return values


def test_the_values_are_those_of_the_installed_header() -> None:
    path = Path(real_library()).parent.parent / "include/cusparseLt.h"
    if not path.exists():
        pytest.skip(f"the library comes without its header: {path}")
    text = path.read_text(encoding="utf-8")
    theirs = enumerators(text)
    ours = {name: int(value) for name, value in re.findall(r"\b(k\w+) = (-?\d+)", HEADER)}
    pairs = {
        "kCompute32F": "CUSPARSE_COMPUTE_32F",
        "kSparsity50Percent": "CUSPARSELT_SPARSITY_50_PERCENT",
        "kBiasPointer": "CUSPARSELT_MATMUL_BIAS_POINTER",
        "kAlgorithmDefault": "CUSPARSELT_MATMUL_ALG_DEFAULT",
        "kAlgorithmId": "CUSPARSELT_MATMUL_ALG_CONFIG_ID",
        "kAlgorithmMaxId": "CUSPARSELT_MATMUL_ALG_CONFIG_MAX_ID",
        "kSplitK": "CUSPARSELT_MATMUL_SPLIT_K",
        "kSplitKMode": "CUSPARSELT_MATMUL_SPLIT_K_MODE",
    }
    assert {name: ours[name] for name in pairs} == {n: theirs[t] for n, t in pairs.items()}
    sizes = [int(size) for size in re.findall(r"uint8_t data\[(\d+)\]", text)]
    assert max(sizes) <= int(re.search(r"uint8_t data\[(\d+)\]", HEADER)[1])
    for name, arguments in re.findall(
        r"X\((cusparseLt\w+),\s*\((.*?)\)\)", HEADER.replace("\\\n", "")
    ):
        declared = re.search(rf"{name}\((.*?)\);", text, re.S)[1]
        assert len(declared.split(",")) == len(arguments.split(",")), name


# -- handles and plans, on a stand-in for the library that tells what it is asked

STAND_IN = """
#include <stdint.h>
#include <stdio.h>
#define SAY(...) (printf(__VA_ARGS__), putchar(10), fflush(stdout), 0)
int cusparseLtInit(void *h) { return SAY("handle"); }
int cusparseLtDestroy(const void *h) { return SAY("~handle"); }
const char *cusparseLtGetErrorName(int s) { return "CUSPARSE_STATUS_NOT_SUPPORTED"; }
const char *cusparseLtGetErrorString(int s) { return "operation not supported"; }
int cusparseLtDenseDescriptorInit(const void *h, void *d, int64_t r, int64_t c, int64_t s,
    uint32_t a, int t, int o) { return SAY("dense %ldx%ld/%ld %u %d %d", r, c, s, a, t, o); }
int cusparseLtStructuredDescriptorInit(const void *h, void *d, int64_t r, int64_t c, int64_t s,
    uint32_t a, int t, int o, int p)
    { return SAY("sparse %ldx%ld/%ld %u %d %d", r, c, s, a, t, o); }
int cusparseLtMatDescriptorDestroy(const void *d) { return 0; }
int cusparseLtMatmulDescriptorInit(const void *h, void *m, int oa, int ob, const void *a,
    const void *b, const void *c, const void *d, int t) { return SAY("matmul op %d %d", oa, ob); }
int cusparseLtMatmulDescSetAttribute(const void *h, void *m, int a, const void *p, size_t n)
    { return SAY("bias %ld", (long)*(void **)p); }
int cusparseLtMatmulAlgSelectionInit(const void *h, void *s, const void *m, int a) { return 0; }
int cusparseLtMatmulAlgSelectionDestroy(const void *s) { return 0; }
int cusparseLtMatmulAlgSetAttribute(const void *h, void *s, int a, const void *p, size_t n)
    { int v = *(int *)p; return v == 99 ? 10 : SAY("set %d = %d", a, v); }
int cusparseLtMatmulAlgGetAttribute(const void *h, const void *s, int a, void *p, size_t n)
    { *(int *)p = 7; return 0; }
int cusparseLtMatmulPlanInit(const void *h, void *p, const void *m, const void *s)
    { return SAY("plan"); }
int cusparseLtMatmulPlanDestroy(const void *p) { return SAY("~plan"); }
int cusparseLtMatmulGetWorkspace(const void *h, const void *p, size_t *n) { *n = 64; return 0; }
int cusparseLtMatmul(const void *h, const void *p, const void *al, const void *a, const void *b,
    const void *be, const void *c, void *d, void *w, void **s, int32_t n) { return SAY(
    "launch %g %g %ld %ld %ld %ld %ld", *(float *)al, *(float *)be, (long)a, (long)b, (long)d,
    (long)w, (long)*s); }
int cusparseLtSpMMACompressedSize2(const void *h, const void *m, size_t *n, size_t *b)
    { *n = 100; *b = 10; return 0; }
int cusparseLtSpMMACompress2(const void *h, const void *m, int is, int op, const void *w, void *c,
    void *b, void *s) { return SAY("compress %d %d", is, op); }
"""
DRIVER = """
#include <stdio.h>
int cuCtxGetDevice(int *d) { *d = 0; return 0; }
int cuThreadExchangeStreamCaptureMode(int *m) { static int mode; int old = mode; mode = *m;
    *m = old; printf("mode %d", mode); putchar(10); fflush(stdout); return 0; }
"""


def drive(folder: Path, code: str) -> list[str]:
    """What the stand-in was asked while the code ran; MADE, the lines of a plan, are folded."""
    library = make_library(folder, STAND_IN + versioned(0, 8, 1))
    make_library(folder, DRIVER, "libcuda.so.1")
    setup = """
cusparselt.library()
from proxsparse.backends.cusparselt import extension as cuda
def layer(has_bias=False, algorithm=-1, late=True, split_k=1, mode=0, device=0):
    return cuda.SparseLinear(device, 0, 32, 64, has_bias, algorithm, split_k, mode, late)
def run(layer, tokens=8, bias=0, workspace=64, weight=100):
    return layer(tokens, 1, weight, 2, bias, 3, 4, workspace, 5)
"""
    environment = {
        **os.environ,
        "PROXSPARSE_CUSPARSELT": str(library),
        "LD_LIBRARY_PATH": str(folder),
    }
    command = [sys.executable, "-uc", f"from proxsparse.backends import cusparselt{setup}{code}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.splitlines()


LAUNCH = "launch 1 0 1 2 3 4 5"
WEIGHT = "sparse 64x32/64 16 14 1"


def made(tokens: int, *between: str) -> list[str]:
    """What making a plan takes: descriptors of the same row-major bytes, nothing transposed."""
    operands = [WEIGHT, f"dense 64x{tokens}/64 16 14 1", f"dense 32x{tokens}/32 16 14 1"]
    return ["mode 2", *operands, "matmul op 1 0", *between, "plan", "mode 0"]


START = ["mode 2", "handle", "mode 0"]


def test_a_plan_is_made_once_for_each_token_count(tmp_path: Path) -> None:
    lines = drive(tmp_path, "a, b = layer(), layer()\nfor m in (8, 8, 16, 8): run(a, m), run(b, m)")
    expected = [*START, *made(8), *[LAUNCH] * 4, *made(16), *[LAUNCH] * 4]
    assert lines == [*expected, "~plan", "~plan", "~handle"]


def test_too_small_a_workspace_launches_nothing(tmp_path: Path) -> None:
    lines = drive(tmp_path, "a = layer()\nprint(run(a, workspace=63), run(a))")
    assert lines == [*START, *made(8), LAUNCH, "64 0", "~plan", "~handle"]


def test_the_bias_is_set_before_each_launch_that_needs_another(tmp_path: Path) -> None:
    lines = drive(tmp_path, "a = layer(True)\nfor bias in (6, 6, 7, 6): run(a, bias=bias)")
    launches = [LAUNCH, LAUNCH, "bias 7", LAUNCH, "bias 6", LAUNCH]
    assert lines == [*START, *made(8, "bias 6"), *launches, "~plan", "~handle"]


def test_where_the_bias_is_read_early_each_has_its_plan(tmp_path: Path) -> None:
    lines = drive(tmp_path, "a = layer(True, late=False)\nfor b in (6, 7, 6): run(a, bias=b)")
    plans = [*made(8, "bias 6"), LAUNCH, *made(8, "bias 7"), LAUNCH, LAUNCH]
    assert lines == [*START, *plans, "~plan", "~plan", "~handle"]


def test_an_algorithm_and_its_split_are_set(tmp_path: Path) -> None:
    code = "a = layer(algorithm=3, split_k=4, mode=2)\nrun(a)\nprint(a.count_algorithms(8, 0))"
    lines = drive(tmp_path, code)
    assert lines[: len(START) + 9] == [*START, *made(8, "set 0 = 3", "set 3 = 4", "set 4 = 2")][:-1]
    assert "7" in lines


def test_each_thread_has_a_handle_that_ends_with_it(tmp_path: Path) -> None:
    code = (
        "import threading\na = layer()\nrun(a)\n"
        "t = threading.Thread(target=run, args=(a,))\nt.start()\nt.join()\n"
        "import time\ntime.sleep(0.5)  # the thread itself ends a little after Python's"
    )
    one = [*START, *made(8), LAUNCH]
    lines = drive(tmp_path, code)
    assert lines == [*one, *one, "~plan", "~handle", "~plan", "~handle"]


def test_what_is_refused_names_the_call_and_the_shapes(tmp_path: Path) -> None:
    code = """
for attempt in (lambda: run(layer(algorithm=99)), lambda: run(layer(), weight=99),
                lambda: run(layer(device=1))):
    try:
        attempt()
    except RuntimeError as error:
        print("error", type(error).__name__, error)
"""
    errors = [line for line in drive(tmp_path, code) if line.startswith("error")]
    assert errors == [
        "error LibraryError cusparseLtMatmulAlgSetAttribute failed with "
        "CUSPARSE_STATUS_NOT_SUPPORTED (operation not supported) for bfloat16 W [32, 64] on "
        "cuda:0, x [8, 64], no bias, algorithm 99, split-k 1 mode 0 (attribute 0 = 99)",
        "error RuntimeError the compressed weight has 99 bytes, cuSPARSELt needs 100 for bfloat16 "
        "W [32, 64] on cuda:0, x [8, 64], no bias, algorithm default, split-k 1 mode 0",
        "error RuntimeError the tensors are on cuda:1, but the current device is cuda:0",
    ]


def test_compressing_asks_for_the_size(tmp_path: Path) -> None:
    code = "print(cuda.compressed_size(0, 1, 32, 64))\ncuda.compress_2to4(0, 1, 32, 64, 1, 2, 3, 4)"
    weight = "sparse 64x32/64 16 2 1"
    expected = [*START, weight, "(100, 10)", weight, "compress 1 1", "~handle"]
    assert drive(tmp_path, code) == expected


# -- what can be compressed


def test_what_cannot_be_compressed_is_said() -> None:
    for n, k in ((24, 32), (32, 24), (0, 16)):
        reason = ops.can_compress(n, k, torch.bfloat16)
        assert f"multiples of 16, and this one is [{n}, {k}]" in reason
    assert "the weight is torch.float32" in ops.can_compress(32, 32, torch.float32)
    if not torch.cuda.is_available():
        assert ops.can_compress(32, 32, torch.float16) == "there is no CUDA device"


def test_compressing_elsewhere_than_on_a_gpu_is_refused() -> None:
    w = reference.project_2to4(torch.randn(32, 32, dtype=torch.bfloat16))
    with pytest.raises(ProxsparseError, match="exists on CUDA devices only"):
        ops.compress_2to4(w)
    with pytest.raises(ProxsparseError, match=r"a weight \[N, K\] is needed"):
        ops.compress_2to4(w[0])
    with pytest.raises(ProxsparseError, match=r"compress_2to4 cannot run on cpu.*reference has no"):
        torch.ops.proxsparse.compress_2to4(w)


# -- on a GPU

sparse_tc = pytest.mark.sparse_tc
SHAPES = ((128, 256), (512, 1024), (4096, 512))
TOKENS = (1, 7, 8, 33, 1024)
DTYPES = (torch.bfloat16, torch.float16)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """An empty tuning table."""
    monkeypatch.setenv("PROXSPARSE_CACHE", str(tmp_path))
    table.table_for.cache_clear()
    table.decisions.clear()
    yield
    table.table_for.cache_clear()
    table.decisions.clear()


class Layer:
    """A weight in every form, with a bias."""

    def __init__(self, n: int, k: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        w = reference.project_2to4(torch.randn(n, k, generator=generator) / k**0.5)
        self.dense = w.to("cuda", dtype)
        self.values, self.codes = ops.pack_2to4(self.dense)
        self.compressed = ops.compress_2to4(self.dense)
        self.bias = torch.randn(n, generator=generator).to("cuda", dtype)
        self.library = self.executor(True)

    def executor(
        self, has_bias: bool, algorithm: int = choice.LIBRARY_CHOICE
    ) -> executors.CuSparseLt:
        n, k = self.dense.shape
        candidate = choice.Candidate("cusparselt", algorithm)
        return executors.CuSparseLt(candidate, 0, self.dense.dtype, n, k, has_bias)

    def exact(self, x: Tensor, has_bias: bool = True) -> Tensor:
        y = x.double() @ self.dense.double().T
        return y + self.bias.double() if has_bias else y

    def run(self, x: Tensor, has_bias: bool = True) -> Tensor:
        """On cuSPARSELt, whatever would be chosen."""
        run = self.library if has_bias else self.executor(False)
        bias = self.bias if has_bias else None
        return run(x, self.values, self.codes, bias, self.compressed, None)


def randn(*shape: int, dtype: torch.dtype = torch.bfloat16, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to("cuda", dtype)


def error(y: Tensor, exact: Tensor) -> float:
    return ((y.double() - exact).norm() / exact.norm()).item()


@sparse_tc
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
@pytest.mark.parametrize("has_bias", [False, True])
def test_is_as_exact_as_dense(
    n: int, k: int, tokens: int, has_bias: bool, dtype: torch.dtype
) -> None:
    layer = Layer(n, k, dtype)
    x = randn(tokens, k, dtype=dtype)
    poison = torch.full((tokens + 8, n), float("nan"), device="cuda", dtype=dtype)
    del poison  # the result is likely to get this memory
    y = layer.run(x, has_bias)
    assert y.shape == (tokens, n) and y.dtype == dtype and y.is_contiguous()
    bias = layer.bias if has_bias else None
    exact = layer.exact(x, has_bias)
    dense = error(torch.nn.functional.linear(x, layer.dense, bias), exact)
    assert error(y, exact) <= 1.1 * dense
    assert torch.equal(y, layer.run(x, has_bias)), "deterministic"


@sparse_tc
@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("forms", [(), ("compressed",), ("dense",), ("compressed", "dense")])
@pytest.mark.parametrize("lead", [(), (3,), (2, 5), (1, 1), (1024,), (0,), (2, 0)])
def test_every_choice_by_the_rule_is_right(
    lead: tuple[int, ...], forms: tuple[str, ...], dtype: torch.dtype
) -> None:
    layer = Layer(256, 128, dtype)
    x = randn(*lead, 128, dtype=dtype)
    given = {name: getattr(layer, name) for name in forms}
    with dispatch.use_backend("cuda"):
        y = ops.sparse_linear(x, layer.values, layer.codes, layer.bias, **given)
    assert y.shape == (*lead, 256)
    if x.numel():
        assert error(y, layer.exact(x)) < 0.01


@sparse_tc
def test_layers_of_one_shape_keep_their_biases() -> None:
    """They may share a plan, which holds one bias pointer at a time."""
    layers = [Layer(512, 1024, seed=seed) for seed in range(3)]
    x = randn(64, 1024)
    for layer in layers * 2:
        assert error(layer.run(x), layer.exact(x)) < 0.01
    early = executors.CuSparseLt(
        choice.Candidate("cusparselt"), 0, torch.bfloat16, 512, 1024, True, is_bias_late=False
    )
    for layer in layers * 2:
        y = early(x, layer.values, layer.codes, layer.bias, layer.compressed, None)
        assert error(y, layer.exact(x)) < 0.01


@sparse_tc
def test_views_and_strides() -> None:
    layer = Layer(256, 128)
    x = randn(40, 2 * 128)
    for view in (x[:, :128], x.view(80, 128)[3:], x.flatten()[1 : 1 + 8 * 128].view(8, 128)):
        assert error(layer.run(view), layer.exact(view)) < 0.01
    layer.bias = randn(257)[1:]
    assert error(layer.run(x[:, :128]), layer.exact(x[:, :128])) < 0.01


@sparse_tc
def test_gradients() -> None:
    layer = Layer(256, 128)
    x = randn(16, 128).requires_grad_()
    bias = layer.bias.clone().requires_grad_()
    grad = randn(16, 256, seed=2)
    y = ops.sparse_linear(x, layer.values, layer.codes, bias, compressed=layer.compressed)
    y.backward(grad)
    assert error(x.grad, grad.double() @ layer.dense.double()) < 0.01
    assert error(bias.grad, grad.double().sum(0)) < 0.01


@sparse_tc
def test_a_graph_replays_with_new_inputs() -> None:
    layer = Layer(1024, 1024)
    x = randn(33, 1024)
    layer.run(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer.run(layer.run(x) * 0.1)
    for seed in range(3):
        x.copy_(randn(33, 1024, seed=seed))
        graph.replay()
        hidden = (layer.run(x) * 0.1).double()
        assert error(y, layer.exact(hidden)) < 0.01


@sparse_tc
def test_capture_as_the_very_first_call() -> None:
    """Handle and plan are made during capture, in a process that has neither."""
    code = """
import torch
from proxsparse import ops
from proxsparse.backends import choice
from proxsparse.backends import cuda as backend_cuda
w = ops.project_2to4(torch.randn(512, 512, device="cuda", dtype=torch.bfloat16))
packed, bias = ops.pack_2to4(w), torch.randn(512, device="cuda", dtype=torch.bfloat16)
compressed = ops.compress_2to4(w)
x = torch.randn(1024, 512, device="cuda", dtype=torch.bfloat16)
results = []
def work():
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = backend_cuda.sparse_linear_cuda(x, *packed, bias, compressed, None)
    graph.replay()
    torch.cuda.synchronize()
    exact = torch.nn.functional.linear(x, w, bias)
    results.append(((y - exact).abs().max() / exact.abs().max()).item())
import threading
thread = threading.Thread(target=work)  # whose handle does not exist yet
thread.start()
thread.join()
print("largest difference", results)
assert results[0] < 0.01
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_stream_keeps_the_larger_of_its_memories(monkeypatch: pytest.MonkeyPatch) -> None:
    captures = {1: 0, 2: 0, 3: 7}
    monkeypatch.setattr(stream_memory, "_memories", {})
    monkeypatch.setattr(stream_memory, "_capture_of", captures.__getitem__)
    signals = iter((10, 20))
    monkeypatch.setattr(stream_memory, "_take_signals", lambda _: next(signals))
    monkeypatch.setattr(stream_memory, "_signals_of_capture", lambda *_: 30)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, dtype, device: empty(size, dtype=dtype))

    first = stream_memory.memory_of(0, 1)
    assert first == (10, None, 0, 0)
    grown = stream_memory.grow(first, 64, 0, 1)
    assert grown.signals == 10
    assert grown.size == grown.workspace.numel() == 64
    assert grown.address == grown.workspace.data_ptr()
    assert stream_memory.memory_of(0, 1) is grown
    # A thread that still has the first one makes its own, and does not replace the other's.
    stream_memory.grow(first, 32, 0, 1)
    assert stream_memory.memory_of(0, 1) is grown
    assert stream_memory.memory_of(0, 2) == (20, None, 0, 0)
    captured = stream_memory.memory_of(0, 3)
    assert stream_memory.grow(captured, 64, 0, 3).signals == 30
    assert stream_memory.memory_of(0, 3) == (30, None, 0, 0), (
        "what is captured is kept by the graph"
    )


def test_a_capture_that_empties_the_stock_has_it_filled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    memories = {(0, 1): stream_memory._Memory(10)}
    monkeypatch.setattr(stream_memory, "_memories", memories)
    monkeypatch.setattr(stream_memory, "_stock_of_signals", {0: [30, 20]})
    monkeypatch.setattr(stream_memory, "_signals_of_captures", {})
    assert stream_memory._signals_of_capture(5, 0, 1) == 20
    assert stream_memory._signals_of_capture(5, 0, 1) == 20, "one capture shares them"
    assert memories
    assert stream_memory._signals_of_capture(5, 0, 2) == 30, "but not with another stream"
    assert not memories, "the next call takes signals anew, and with that fills the stock up"
    assert stream_memory._signals_of_capture(6, 0, 1) == 0


def test_captures_that_run_one_by_one_share_signals(monkeypatch: pytest.MonkeyPatch) -> None:
    """vLLM captures one graph a layer and size, thousands, and the stock holds 256."""
    monkeypatch.setattr(stream_memory, "_memories", {})
    monkeypatch.setattr(stream_memory, "_stock_of_signals", {0: [50, 40, 30, 20], 1: [70, 60]})
    monkeypatch.setattr(stream_memory, "_signals_of_captures", {})
    monkeypatch.setattr(stream_memory, "_serial_signals", {})
    monkeypatch.setattr(stream_memory, "memory_of", lambda *_: None)
    monkeypatch.setattr(stream_memory, "current_stream", lambda _: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda _: contextlib.nullcontext())
    assert stream_memory._signals_of_capture(1, 0, 9) == 20
    for _ in range(2):  # once or for every layer of a model
        stream_memory.promise_serial_replay(0)
    # Who captured before the promise may replay whenever it likes, so nobody joins it.
    assert {stream_memory._signals_of_capture(i, 0, 9) for i in range(2, 2000)} == {30}
    assert {stream_memory._signals_of_capture(i, 0, 8) for i in range(2000, 4000)} == {40}, (
        "streams of one capture run at the same time"
    )
    assert stream_memory._stock_of_signals[0] == [50]
    assert stream_memory._signals_of_capture(4000, 1, 9) == 60, "another GPU has promised nothing"
    assert stream_memory._signals_of_capture(4001, 1, 9) == 70


def test_a_promised_capture_that_found_no_signals_looks_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(stream_memory, "_memories", {})
    monkeypatch.setattr(stream_memory, "_stock_of_signals", {0: []})
    monkeypatch.setattr(stream_memory, "_signals_of_captures", {})
    monkeypatch.setattr(stream_memory, "_serial_signals", {0: {}})
    assert stream_memory._signals_of_capture(5, 0, 1) == 0
    stream_memory._stock_of_signals[0].append(30)
    assert stream_memory._signals_of_capture(6, 0, 1) == 30
    assert stream_memory._signals_of_capture(7, 0, 1) == 30


@pytest.mark.gpu
def test_decisions_made_ahead_serve_a_capture() -> None:
    """What is first met inside a capture has its kernels untried, and would stay without them."""
    w = ops.project_2to4(torch.randn(256, 256, device="cuda", dtype=torch.bfloat16))
    values, codes, compressed = ops.lay_out_2to4(*ops.pack_2to4(w))
    table.forget_decisions()
    ops.decide_sparse_linear(values, codes, compressed=compressed)
    known = dict(table.decisions)
    for tokens in (1, 7, 64, 65, 500, 2048, 20000):
        x = torch.randn(tokens, 256, device="cuda", dtype=torch.bfloat16)
        ops.sparse_linear(x, values, codes, compressed=compressed)
    assert table.decisions == known, "a call had to decide"


def test_a_decision_off_cuda_needs_nothing_and_looks_at_the_weight() -> None:
    values, codes = ops.pack_2to4(ops.project_2to4(torch.randn(8, 16)))
    ops.decide_sparse_linear(values, codes)
    with pytest.raises(ProxsparseError, match="no packed 2:4 weight"):
        ops.decide_sparse_linear(values, codes[:4])


@sparse_tc
def test_two_streams_do_not_share_a_workspace() -> None:
    layer = Layer(4096, 4096)
    inputs = [randn(256, 4096, seed=seed) for seed in range(2)]
    expected = [layer.run(x) for x in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()
    results: list[list[Tensor]] = [[], []]
    for _ in range(20):
        for x, stream, kept in zip(inputs, streams, results, strict=True):
            with torch.cuda.stream(stream):
                kept.append(layer.run(x))
    torch.cuda.synchronize()
    for kept, y in zip(results, expected, strict=True):
        assert all(torch.equal(one, y) for one in kept)


@sparse_tc
def test_threads_have_their_own_handles() -> None:
    layers = [Layer(512, 1024, seed=seed) for seed in range(4)]
    x = randn(64, 1024)
    expected = [layer.run(x) for layer in layers]
    torch.cuda.synchronize()
    failures: list[object] = []

    def work(index: int) -> None:
        try:
            with torch.cuda.stream(torch.cuda.Stream()):
                results = [layers[index].run(x) for _ in range(50)]
                torch.cuda.current_stream().synchronize()
            assert all(torch.equal(y, expected[index]) for y in results)
        except BaseException as error:
            failures.append(error)

    for _ in range(2):  # the second lot starts after the first lot's handles are gone
        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(layers))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not failures


@sparse_tc
@pytest.mark.two_gpus
def test_a_second_device() -> None:
    layer = Layer(512, 1024)
    x = randn(1024, 1024)
    forms = (x, layer.values, layer.codes, layer.bias, layer.compressed, layer.dense)
    expected = backend_cuda.sparse_linear_cuda(*forms)
    assert torch.cuda.current_device() == 0
    other = backend_cuda.sparse_linear_cuda(*(form.to("cuda:1") for form in forms))
    assert other.get_device() == 1 and torch.equal(other.to(0), expected)
    assert torch.equal(ops.compress_2to4(layer.dense.to("cuda:1")).to(0), layer.compressed)
    with pytest.raises(ProxsparseError, match="compressed weight is on cuda:1"):
        backend_cuda.sparse_linear_cuda(*forms[:4], layer.compressed.to("cuda:1"), None)


@sparse_tc
def test_errors_carry_the_librarys_text_the_call_and_the_shapes() -> None:
    layer = Layer(256, 128)
    run = layer.executor(False, algorithm=10**6)
    with pytest.raises(
        RuntimeError, match=r"cusparseLt\w+ failed with CUSPARSE_STATUS_\w+ \(.*\) "
    ) as e:
        run(randn(8, 128), layer.values, layer.codes, None, layer.compressed, None)
    assert "bfloat16 W [256, 128] on cuda:0, x [8, 128], no bias, algorithm 1000000" in str(e.value)
    with pytest.raises(RuntimeError, match="the compressed weight has 8 bytes, cuSPARSELt needs"):
        layer.executor(False)(
            randn(8, 128), layer.values, layer.codes, None, layer.compressed[:8], None
        )


@sparse_tc
def test_what_does_not_agree_is_refused() -> None:
    layer = Layer(256, 128)
    forms = layer.values, layer.codes
    x = randn(8, 128)
    with pytest.raises(ProxsparseError, match="but bias is"):
        backend_cuda.sparse_linear_cuda(x, *forms, layer.bias.float(), None, None)
    with pytest.raises(ProxsparseError, match="but values is"):
        backend_cuda.sparse_linear_cuda(x.half(), *forms, None, None, None)
    with pytest.raises(ProxsparseError, match="w is not 2:4: row 0, columns 0 to 3"):
        ops.compress_2to4(torch.ones(32, 32, device="cuda", dtype=torch.bfloat16))
    odd = reference.project_2to4(randn(24, 32))
    with pytest.raises(ProxsparseError, match=r"multiples of 16, and this one is \[24, 32\]"):
        ops.compress_2to4(odd)


@sparse_tc
@pytest.mark.usefixtures("cache")
def test_the_ops_are_what_pytorch_expects() -> None:
    layer = Layer(256, 128)
    arguments = (randn(1024, 128), layer.values, layer.codes, layer.bias, layer.compressed, None)
    torch.library.opcheck(torch.ops.proxsparse.sparse_linear.default, arguments)
    torch.library.opcheck(
        torch.ops.proxsparse.compress_2to4.default,
        (layer.dense,),
        test_utils=("test_schema", "test_faketensor"),
    )
    compiled = torch.compile(
        lambda x: ops.sparse_linear(
            x, layer.values, layer.codes, layer.bias, compressed=layer.compressed
        ),
        fullgraph=True,
        backend="aot_eager",
    )
    assert torch.equal(compiled(arguments[0]), torch.ops.proxsparse.sparse_linear(*arguments))


@sparse_tc
@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_tuning_on_this_gpu() -> None:
    """The child process measures, and what it finds runs and is never a wrong one."""
    report = tune.tune_layers(
        [(4096, 4096, True)], [1, 1024], dtype=torch.bfloat16, seconds=300, show_progress=False
    )
    assert report.num_measured == 2, report
    record = table.table_for(0).get(choice.Cell(4096, 4096, 1024, "bfloat16", True))
    assert "cusparselt" in record.top and {"prefill", "unpack"} & set(record.top), record
    layer = Layer(4096, 4096)
    for tokens in (1, 1000, 1024):
        x = randn(tokens, 4096)
        y = backend_cuda.sparse_linear_cuda(
            x, layer.values, layer.codes, layer.bias, layer.compressed, layer.dense
        )
        assert error(y, layer.exact(x)) < 0.01


@sparse_tc
def test_the_worker_answers_for_what_it_survives() -> None:
    worker = importlib.import_module("proxsparse.tuning.trials")
    cell = choice.Cell(512, 1024, 64, "bfloat16", True)
    bench = worker.Bench(0)
    answer: Callable[..., dict] = worker.answer
    found = answer(bench, {"do": "candidates", "cell": cell})["candidates"]
    assert choice.Candidate("cusparselt") in found
    request = {"do": "measure", "cell": cell, "tokens": 64, "final": True}
    ok = answer(bench, {**request, "candidate": choice.Candidate("unpack")})
    assert ok["kind"] == "ok" and ok["seconds"] > 0 and ok["speedup"] > 0, ok
    ok = answer(bench, {**request, "candidate": choice.Candidate("cusparselt")})
    assert ok["kind"] == "ok", ok
    refused = answer(bench, {**request, "candidate": choice.Candidate("cusparselt", 10**6)})
    assert refused["kind"] == "refused" and "CUSPARSE_STATUS" in refused["detail"]
