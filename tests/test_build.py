"""setup.py: what it builds, what it refuses, and what it leaves behind."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from setuptools import Distribution, Extension
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("proxsparse_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def choose(build: ModuleType, forced: str = "", **changes: object) -> dict[str, str]:
    """What is left out on a Linux machine that has everything, but for the changes."""
    machine = {"has_compiler": True, "has_nvcc": True, "has_kernels": True, "platform": "linux"}
    return build.choose_build(forced, **{**machine, **changes})


def test_everything_is_built_where_everything_is_there(build: ModuleType) -> None:
    assert choose(build) == choose(build, "cuda") == {}


def test_nothing_is_built_without_a_compiler(build: ModuleType) -> None:
    left_out = choose(build, has_compiler=False)
    assert set(left_out) == set(build.PARTS)
    assert all("no C++ compiler" in reason for reason in left_out.values())


def test_without_nvcc_only_the_kernels_are_left_out(build: ModuleType) -> None:
    assert list(choose(build, has_nvcc=False)) == [build.KERNELS]
    assert "no nvcc was found" in choose(build, has_nvcc=False)[build.KERNELS]
    assert choose(build, has_kernels=False) == {
        build.KERNELS: "csrc/cuda has no .cu file to compile"
    }


def test_cuda_is_for_linux(build: ModuleType) -> None:
    left_out = choose(build, platform="darwin")
    assert left_out == dict.fromkeys(("_cuda", build.KERNELS), "CUDA is for Linux, this is darwin")


def test_none_and_cpu_leave_out_what_is_there(build: ModuleType) -> None:
    assert choose(build, "none") == dict.fromkeys(build.PARTS, "PROXSPARSE_BUILD=none")
    assert choose(build, "cpu") == dict.fromkeys(("_cuda", build.KERNELS), "PROXSPARSE_BUILD=cpu")


@pytest.mark.parametrize(
    ("forced", "changes", "message"),
    [
        ("cpu", {"has_compiler": False}, "PROXSPARSE_BUILD=cpu, but no C"),
        ("cuda", {"has_nvcc": False}, "PROXSPARSE_BUILD=cuda, but no nvcc was found"),
        ("cuda", {"has_compiler": False}, "PROXSPARSE_BUILD=cuda, but no C"),
        ("cuda", {"platform": "darwin"}, "PROXSPARSE_BUILD=cuda, but CUDA is for Linux"),
        ("fast", {}, "'fast': it must be one of cpu, cuda, none"),
    ],
)
def test_forced_and_impossible_is_an_error(
    build: ModuleType, forced: str, changes: dict[str, object], message: str
) -> None:
    with pytest.raises(SetupError, match=message):
        choose(build, forced, **changes)


def executable(path: Path, text: str = "exit 1") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_cuda_home_goes_before_the_path(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    on_path = executable(tmp_path / "path" / "nvcc")
    at_home = executable(tmp_path / "home" / "bin" / "nvcc")
    monkeypatch.setenv("PATH", str(on_path.parent))
    monkeypatch.delenv("CUDA_HOME", raising=False)
    assert build.find_nvcc() == str(on_path)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "home"))
    assert build.find_nvcc() == str(at_home)


@pytest.mark.parametrize("forced", ["", "cuda"])
def test_kernels_that_do_not_compile_are_left_out_unless_forced(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, forced: str
) -> None:
    built = []

    def compile_all(extension: Extension) -> None:
        built.append(build.KERNELS not in command.left_out)
        if built[-1]:
            raise CompileError("nvcc is broken")

    command = build.NinjaBuild(Distribution())
    command.left_out = {}
    monkeypatch.setattr(command, "build_extension", compile_all)
    extension = Extension("proxsparse._cuda", ["a.cpp", "b.cu"])
    if forced:
        with pytest.raises(CompileError, match="nvcc is broken"):
            command.build_or_leave_out(extension, "_cuda", forced)
        return
    command.build_or_leave_out(extension, "_cuda", forced)
    assert built == [True, False]
    assert command.left_out == {build.KERNELS: "nvcc is broken"}


def test_an_extension_that_does_not_compile_is_left_out(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(extension: Extension) -> None:
        raise CompileError("the compiler failed")

    command = build.NinjaBuild(Distribution())
    command.left_out = {build.KERNELS: "no nvcc"}
    monkeypatch.setattr(command, "build_extension", fail)
    command.build_or_leave_out(Extension("proxsparse._cuda", ["a.cpp"]), "_cuda", "")
    assert command.left_out == {build.KERNELS: "no nvcc", "_cuda": "the compiler failed"}


def test_cxx_names_the_compiler(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("CXX", f"{sys.executable} -B")
    assert build.find_compiler() == [sys.executable, "-B"]
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.find_compiler() is None
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.find_compiler() is None


def test_ninja_file_survives_spaces(build: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "a b"
    sources = [
        tmp_path / "c d" / name for name in ("module.cpp", "prox.cpp", "a.cu", "a_hopper.cu")
    ]
    variables = {"cxx": "c++", "cflags": "-O3", "nvcc": "'/a b/nvcc'", "linker": "$CXX"}
    build.write_ninja(folder, tmp_path / "out.so", sources, variables, "-O3 '-Ix y'")
    text = (folder / "build.ninja").read_text()
    assert "c$ d/module.cpp" in text and "a$ b/prox.o" in text
    assert text.count("'-Ix y'") == 1, "only module.cpp sees pybind11"
    assert "a.o: compile_cuda " in text and text.count(": compile ") == 2
    _, plain, hopper = text.split(": compile_cuda ")
    assert "sm_80" in plain and "sm_90a" not in plain
    assert "sm_90a" in hopper and "sm_80" not in hopper
    assert "linker = $$CXX" in text


@pytest.mark.parametrize(("forced", "is_pure"), [("none", True), ("cpu", False)])
def test_a_wheel_without_machine_code_is_for_any_machine(
    build: ModuleType, monkeypatch: pytest.MonkeyPatch, forced: str, is_pure: bool
) -> None:
    monkeypatch.setenv("PROXSPARSE_BUILD", forced)
    monkeypatch.setattr(build, "find_compiler", lambda: ["c++"])
    extensions = [Extension("proxsparse._cpu", ["a.cpp"]), Extension("proxsparse._cuda", ["b.cu"])]
    command = build.TaggedWheel(Distribution({"name": "x", "ext_modules": extensions}))
    command.ensure_finalized()
    assert (command.get_tag() == ("py3", "none", "any")) is is_pure


def test_the_build_says_what_is_in_it(
    build: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    command = build.NinjaBuild(Distribution())
    command.compiled, command.left_out = ["_cpu"], {"_cuda": "no nvcc was found"}
    command.tell()
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "proxsparse: compiled: _cpu",
        "proxsparse: left out: _cuda, because no nvcc was found",
    ]


def test_version_is_printed_without_building(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "setup.py"), "--version"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.splitlines()[-1] == "0.1.0", result.stderr


def make_wheel(folder: Path, environment: dict[str, str]) -> zipfile.ZipFile:
    source = folder / "a source"
    source.mkdir()
    for name in ("csrc", "kernels", "proxsparse"):
        skip = shutil.ignore_patterns("*.so", "_build_error_*.txt", "__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=skip)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--wheel-dir", str(folder / "dist"), str(source)]
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return zipfile.ZipFile(next((folder / "dist").glob("*.whl")))


@pytest.mark.slow
def test_wheel_without_a_compiler_says_what_it_lacks(tmp_path: Path) -> None:
    pytest.importorskip("ninja")
    pytest.importorskip("pybind11")
    (tmp_path / "empty").mkdir()
    environment = {**os.environ, "PATH": str(tmp_path / "empty")}
    environment.pop("CXX", None)
    wheel = make_wheel(tmp_path, environment)
    assert Path(wheel.filename or "").name.endswith("-py3-none-any.whl")
    assert not any(name.endswith(".so") for name in wheel.namelist())
    for part in ("cpu", "cuda", "cuda_kernels"):
        assert "no C++ compiler" in wheel.read(f"proxsparse/_build_error_{part}.txt").decode()
    assert "proxsparse/kernels/__init__.py" in wheel.namelist()
    assert "proxsparse/demo_model/model.safetensors" in wheel.namelist()
