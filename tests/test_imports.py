"""Which room may import which, read from the sources; and what importing the package costs.

The kernels know nothing of the package, the reference knows torch only, models, learning and
inference reach the backends through `ops`, and nothing imports the command line.
"""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "proxsparse"
KERNELS = ROOT / "kernels"  # installed as proxsparse.kernels
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
FILES |= {
    f"proxsparse.kernels.{path.stem}".removesuffix(".__init__"): path
    for path in sorted(KERNELS.glob("*.py"))
}
MODULES = [name for name in FILES if not name.startswith("proxsparse.kernels")]
KERNEL_MODULES = [name for name in FILES if name.startswith("proxsparse.kernels")]
EXTENSIONS = ("proxsparse._cpu", "proxsparse._cuda")
# Room -> what its files may import of ours: other rooms, or single files of them. `ops` imports
# its backends when a tensor needs them, never when it is loaded; see the tests below.
ROOMS: dict[str, set[str]] = {
    "errors": set(),
    "config": {"errors"},
    "ops": {"errors", "backends"},
    "backends": {"errors", "ops.reference", "_cpu", "_cuda"},
    "tuning": {"errors", "progress", "backends", "ops"},
    "models": {"errors", "config", "ops"},
    "data": {"errors", "config", "progress", "models.precision", "models.positions"},
    "learning": {"errors", "config", "progress", "ops", "models"},
    "methods": {"errors", "config", "ops", "models", "learning"},
    "inference": {"errors", "config", "ops", "models"},
    "vllm": {"errors", "ops", "models"},  # vLLM calls it; nothing of ours does
    "jobs": {
        *(
            "errors",
            "config",
            "progress",
            "ops",
            "backends",
            "tuning",
            "models",
            "data",
            "learning",
        ),
        *("methods", "inference"),
    },
    "demo_model": set(),
    "cli": {"errors", "config", "jobs", "learning.launcher", "progress"},
    "progress": set(),
    "__main__": {"cli"},
    "proxsparse": {"inference.registration"},  # everything else by name, on first use
}
MAX_LINES = 500
LONG_FILES = {
    "ops.reference",
    "ops",
    "cli",
}  # a definition, a list of checked functions, a list of commands


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def statements(node: ast.AST, lazy: bool) -> Iterator[ast.Import | ast.ImportFrom]:
    """Import statements that run when the module is imported and, if `lazy`, also later ones."""
    for child in ast.iter_child_nodes(node):
        if is_type_checking(child):
            continue
        if isinstance(child, (ast.Import, ast.ImportFrom)):
            yield child
        elif lazy or not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)):
            yield from statements(child, lazy)


def imports(module: str, *, lazy: bool = True) -> set[str]:
    """Absolute names of the modules that a module imports; of ours each one that exists."""
    path = FILES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    found = set()
    for statement in statements(ast.parse(path.read_text(encoding="utf-8")), lazy):
        if isinstance(statement, ast.Import):
            found |= {alias.name for alias in statement.names}
            continue
        base = statement.module or ""
        if statement.level:
            above = package.split(".")[: len(package.split(".")) - statement.level + 1]
            base = ".".join([*above, *([base] if base else [])])
        for alias in statement.names:
            member = f"{base}.{alias.name}"
            found.add(member if member in FILES or member in EXTENSIONS else base)
    return found


def first_party(names: set[str]) -> set[str]:
    """Our modules among the names, without the prefix."""
    return {n.removeprefix("proxsparse.") for n in names if n.split(".")[0] == "proxsparse"}


def third_party(names: set[str]) -> set[str]:
    top = {name.split(".")[0] for name in names}
    return top - set(sys.stdlib_module_names) - {"proxsparse", "__future__"}


def room_of(module: str) -> str:
    return module.removeprefix("proxsparse.").split(".")[0]


def test_the_files_are_found() -> None:
    expected = {"proxsparse", "proxsparse.ops", "proxsparse.methods.gates", "proxsparse.kernels"}
    assert expected <= set(FILES)


@pytest.mark.parametrize("module", KERNEL_MODULES)
def test_kernels_know_nothing_of_the_package(module: str) -> None:
    assert third_party(imports(module)) <= {"torch", "triton"}
    outside = {name for name in first_party(imports(module)) if name.split(".")[0] != "kernels"}
    assert not outside
    assert "torch.library" not in FILES[module].read_text(encoding="utf-8")


def test_the_kernels_package_is_a_docstring() -> None:
    """Hugging Face's package is called `kernels` as well: importing ours must do nothing."""
    body = ast.parse((KERNELS / "__init__.py").read_text(encoding="utf-8")).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant)


@pytest.mark.parametrize("module", MODULES)
def test_rooms_import_what_they_may(module: str) -> None:
    """A new file needs no row, a new room does."""
    room = room_of(module)
    assert room in ROOMS, f"{room} is new: say in ROOMS what it may import"
    allowed = ROOMS[room] | {room}
    foreign = {
        name
        for name in first_party(imports(module))
        if name != "proxsparse"  # for its version
        and not any(name == may or name.startswith(f"{may}.") for may in allowed)
    }
    assert not foreign


def test_no_import_comes_back_to_where_it_began() -> None:
    """Neither between files, nor when it is made later, inside a function."""
    graph = {
        name: {
            other
            for other in imports(name)
            # A package's own file is run before its members, which need it for its name only.
            if other in FILES and not name.startswith(f"{other}.")
        }
        for name in MODULES
    }
    state: dict[str, int] = {}

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert state.get(name) != 1, " -> ".join((*path[path.index(name) :], name))
        if name in state:
            return
        state[name] = 1
        for other in sorted(graph.get(name, ())):
            visit(other, (*path, name))
        state[name] = 2

    for name in MODULES:
        visit(name, ())


@pytest.mark.parametrize("module", MODULES)
def test_files_are_short(module: str) -> None:
    lines = FILES[module].read_text(encoding="utf-8").count("\n")
    assert lines <= MAX_LINES or module.removeprefix("proxsparse.") in LONG_FILES


def test_reference_imports_torch_and_nothing_of_ours() -> None:
    names = imports("proxsparse.ops.reference")
    assert third_party(names) == {"torch"}
    assert not first_party(names)


@pytest.mark.parametrize("module", MODULES)
def test_extensions_and_kernels_have_one_door_each(module: str) -> None:
    allowed = {"proxsparse.backends.cpu": {"_cpu"}, "proxsparse.backends.cusparselt": {"_cuda"}}
    names = {name.split(".")[0] for name in first_party(imports(module))}
    assert names & {"kernels", "_cpu", "_cuda"} == allowed.get(module, set())
    assert "triton" not in third_party(imports(module))
    if room_of(module) in ("ops", "backends"):
        assert third_party(imports(module)) <= {"torch", "cuda"}  # cuda: NVIDIA's path finder


@pytest.mark.parametrize("module", ["proxsparse.errors", "proxsparse.config"])
def test_configs_and_errors_need_no_library(module: str) -> None:
    names = imports(module)
    assert not third_party(names)
    assert first_party(names) <= {"errors"}


@pytest.mark.parametrize("module", MODULES)
def test_nobody_imports_the_command_line(module: str) -> None:
    if module != "proxsparse.__main__":
        assert "cli" not in first_party(imports(module))


@pytest.mark.parametrize("module", MODULES)
def test_heavy_libraries_are_imported_when_needed(module: str) -> None:
    made_of_theirs = ("proxsparse.inference.quantizer", "proxsparse.inference.adapters")
    if module in made_of_theirs:  # of what is in transformers and peft
        return
    heavy = {"transformers", "datasets", "matplotlib", "pyarrow", "lm_eval", "accelerate"}
    assert not third_party(imports(module, lazy=False)) & heavy
    if room_of(module) == "cli":  # --help answers at once
        assert "torch" not in third_party(imports(module, lazy=False))
        light = {"config", "errors", "progress", "jobs.checks", "learning.launcher"}
        light |= {"cli.framework", "cli.show"}
        assert first_party(imports(module, lazy=False)) <= light


def run_python(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )


LOADED = "print(*sorted({name.split('.')[0] for name in sys.modules}))"


def test_import_loads_no_library_and_prints_nothing() -> None:
    done = run_python(
        "import sys, proxsparse, runpy\n"
        "assert proxsparse.__version__ and 'prune' in dir(proxsparse)\n"
        f"runpy.run_path({str(KERNELS / '__init__.py')!r})\n" + LOADED
    )
    assert not done.stderr
    (loaded,) = done.stdout.splitlines()  # the one line is ours
    assert not {"torch", "transformers", "triton", "numpy", "safetensors"} & set(loaded.split())


def test_ops_load_neither_a_model_library_nor_a_backend() -> None:
    done = run_python(
        "import sys, proxsparse.ops\n"
        "backends = {'_cpu', '_cuda', 'backends', 'kernels'}\n"
        "backends = {f'proxsparse.{name}' for name in backends}\n"
        "assert not backends & set(sys.modules)\n" + LOADED
    )
    assert "transformers" not in done.stdout.split()


def test_public_names_resolve() -> None:
    run_python("import proxsparse\nfor name in proxsparse.__all__: getattr(proxsparse, name)")


def test_an_unknown_name_is_an_attribute_error() -> None:
    import proxsparse

    with pytest.raises(AttributeError, match="no attribute 'learn_mask'"):
        _ = proxsparse.learn_mask
