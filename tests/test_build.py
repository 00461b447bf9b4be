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
from setuptools.errors import SetupError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("proxsparse_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_automatic_choice_needs_a_compiler(build: ModuleType) -> None:
    assert build.choose_build("", True) == (True, "")
    chosen, reason = build.choose_build("", False)
    assert not chosen and "no C++ compiler" in reason


def test_none_leaves_the_extension_out(build: ModuleType) -> None:
    assert build.choose_build("none", True) == (False, "PROXSPARSE_BUILD=none")


@pytest.mark.parametrize(
    ("forced", "has_compiler", "message"),
    [
        ("cpu", False, "PROXSPARSE_BUILD=cpu, but no C"),
        ("cuda", True, "no CUDA extension to compile"),
        ("fast", True, "'fast': it must be one of cpu, cuda, none"),
    ],
)
def test_forced_and_impossible_is_an_error(
    build: ModuleType, forced: str, has_compiler: bool, message: str
) -> None:
    with pytest.raises(SetupError, match=message):
        build.choose_build(forced, has_compiler)


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
    sources = [tmp_path / "c d" / "module.cpp", tmp_path / "c d" / "prox.cpp"]
    build.write_ninja(folder, tmp_path / "out.so", sources, ["c++"], ["-O3"], "-shared", ["-Ix y"])
    text = (folder / "build.ninja").read_text()
    assert "c$ d/module.cpp" in text and "a$ b/prox.o" in text
    assert text.count("'-Ix y'") == 1, "only module.cpp sees pybind11"


def test_version_is_printed_without_building(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "setup.py"), "--version"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert result.stdout.splitlines()[-1] == "0.1.0", result.stderr


def make_wheel(folder: Path, environment: dict[str, str]) -> zipfile.ZipFile:
    source = folder / "a source"
    source.mkdir()
    for name in ("csrc", "kernels", "proxsparse"):
        skip = shutil.ignore_patterns("*.so", "_build_error.txt", "__pycache__")
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
    assert not any(name.startswith("proxsparse/_cpu.") for name in wheel.namelist())
    assert "no C++ compiler" in wheel.read("proxsparse/_build_error.txt").decode()
    assert "proxsparse/kernels/__init__.py" in wheel.namelist()
    assert "proxsparse/demo_model/model.safetensors" in wheel.namelist()
