"""Builds the C++ extension with ninja; everything else about the package is in pyproject.toml.

The extension needs a C++17 compiler and no torch: it takes pointers. Without a compiler the
package installs and runs on the PyTorch reference, and says so here and in `proxsparse env`. The
environment variable PROXSPARSE_BUILD forces the choice: `cpu` fails where the extension cannot be
built, `none` leaves it out, `cuda` fails: this version has no GPU code to compile.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent
CHOICES = ("cpu", "cuda", "none")
# errno and floating-point traps are not used and would keep loops from being vectorised. No flag
# changes the meaning of NaN, infinity or -0.0.
COMPILE_FLAGS = [
    *("-std=c++17", "-O3", "-fPIC", "-fvisibility=hidden", "-Wall", "-Wextra"),
    *("-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-Wno-unknown-pragmas"),
]
LINK_FLAGS = "-bundle -undefined dynamic_lookup" if sys.platform == "darwin" else "-shared"

NINJA_RULES = """\
rule compile
  command = $cxx $cflags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $in
rule link
  command = $cxx $in $ldflags -o $out
  description = link $out
"""


def find_compiler() -> list[str] | None:
    """The command of a C++ compiler, from CXX or the usual names on PATH."""
    command = shlex.split(os.environ.get("CXX", ""))
    if command:
        return command if shutil.which(command[0]) else None
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def choose_build(forced: str, has_compiler: bool) -> tuple[bool, str]:
    """Whether to build the extension, and the reason when not.

    Args:
        forced: the value of PROXSPARSE_BUILD, empty for the automatic choice.
        has_compiler: whether a C++ compiler was found.

    Raises:
        SetupError: the value is unknown, or what it forces is impossible.
    """
    if forced not in ("", *CHOICES):
        raise SetupError(f"PROXSPARSE_BUILD is {forced!r}: it must be one of {', '.join(CHOICES)}")
    if forced == "cuda":
        raise SetupError(
            "PROXSPARSE_BUILD=cuda, but this version has no CUDA extension to compile: its GPU "
            "kernels are Triton and need no build step. Unset it, or use PROXSPARSE_BUILD=cpu"
        )
    if forced == "none":
        return False, "PROXSPARSE_BUILD=none"
    if not has_compiler:
        reason = "no C++ compiler was found (looked for $CXX, c++, g++ and clang++)"
        if forced:
            raise SetupError(f"PROXSPARSE_BUILD={forced}, but {reason}")
        return False, reason
    return True, ""


def report(message: str) -> None:
    """Shows a line during the build (pip prints it with -v)."""
    print(f"proxsparse: {message}", file=sys.stderr)


def compiles(compiler: list[str], flags: list[str]) -> bool:
    """Whether a trivial program builds with these flags."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "probe.cpp"
        source.write_text("#include <omp.h>\nint main() { return omp_get_max_threads() < 1; }\n")
        command = [*compiler, *flags, str(source), "-o", str(Path(folder) / "probe")]
        return subprocess.run(command, capture_output=True).returncode == 0


def find_ninja() -> str:
    """The ninja executable of the Python package, or else the one on PATH."""
    try:
        import ninja
    except ImportError as error:
        found = shutil.which("ninja")
        if found is None:
            raise CompileError("ninja is needed to build: pip install pybind11 ninja") from error
        return found
    return os.path.join(ninja.BIN_DIR, "ninja")


def escape(path: Path) -> str:
    """A path as ninja writes it."""
    return str(path).replace("$", "$$").replace(" ", "$ ").replace(":", "$:")


def write_ninja(
    folder: Path,
    target: Path,
    sources: list[Path],
    cxx: list[str],
    cflags: list[str],
    ldflags: str,
    python_flags: list[str],
) -> None:
    """Writes folder/build.ninja, which compiles each source in parallel and links `target`.

    ninja compares commands and follows headers, so a second build compiles what changed. Only
    module.cpp gets `python_flags`: build isolation moves pybind11 with every build.
    """
    variables = {"cxx": shlex.join(cxx), "cflags": shlex.join(cflags), "ldflags": ldflags}
    lines = [f"{name} = {value.replace('$', '$$')}" for name, value in variables.items()]
    lines.append(NINJA_RULES)
    objects = []
    for source in sources:
        objects.append(escape(folder / f"{source.stem}.o"))
        lines.append(f"build {objects[-1]}: compile {escape(source)}")
        if source.name == "module.cpp":
            lines.append(f"  cflags = {shlex.join([*cflags, *python_flags]).replace('$', '$$')}")
    lines.append(f"build {escape(target)}: link {' '.join(objects)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")


class NinjaBuild(build_ext):
    """build_ext whose compiling and linking is ninja's."""

    def build_extensions(self) -> None:
        """Builds the extension, or leaves it out and keeps the reason beside the package.

        Raises:
            SetupError: PROXSPARSE_BUILD forces what is impossible here.
        """
        forced = os.environ.get("PROXSPARSE_BUILD", "")
        build, reason = choose_build(forced, find_compiler() is not None)
        if build:
            try:
                for extension in self.extensions:
                    self.build_extension(extension)
            except CompileError as error:
                if forced:
                    raise
                reason = str(error)
        package = ROOT / "proxsparse" if self.editable_mode else Path(self.build_lib, "proxsparse")
        note = package / "_build_error.txt"
        if not reason:
            note.unlink(missing_ok=True)
            return
        for stale in package.glob("_cpu.*"):
            stale.unlink()
        package.mkdir(parents=True, exist_ok=True)
        note.write_text(reason + "\n")
        report(f"the C++ extension is left out: {reason}")
        report("ops on CPU tensors will run on the PyTorch reference, which is much slower")

    def build_extension(self, ext: Extension) -> None:
        """Compiles and links one extension.

        Raises:
            CompileError: a build tool is missing, or the compiler failed; its output was shown.
        """
        try:
            import pybind11
        except ImportError as error:
            raise CompileError("pybind11 is needed to build: pip install pybind11 ninja") from error
        ninja = find_ninja()
        compiler = find_compiler()
        assert compiler is not None, "choose_build saw one"
        cflags, ldflags = COMPILE_FLAGS, LINK_FLAGS
        if compiles(compiler, ["-fopenmp"]):
            cflags, ldflags = [*cflags, "-fopenmp"], ldflags + " -fopenmp"
        else:
            report(f"{compiler[0]} has no OpenMP: {ext.name} will use one thread")
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        folder = ROOT / "build" / f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        includes = (pybind11.get_include(), sysconfig.get_path("include"))
        write_ninja(
            folder,
            target,
            [ROOT / source for source in ext.sources],
            compiler,
            cflags,
            ldflags,
            [f"-I{include}" for include in includes],
        )
        if subprocess.run([ninja, "-C", str(folder)]).returncode:
            raise CompileError("the compiler failed; `pip install -v` shows its messages")


if __name__ == "__main__":
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc" / "cpu").glob("*.cpp"))
    setup(
        packages=[
            *find_packages(include=["proxsparse", "proxsparse.*"]),
            *("proxsparse.demo_model", "proxsparse.kernels"),
        ],
        package_dir={"proxsparse.kernels": "kernels"},
        package_data={"proxsparse": ["py.typed"], "proxsparse.demo_model": ["*"]},
        # optional: whether it is built is decided in NinjaBuild.
        ext_modules=[Extension("proxsparse._cpu", sources, optional=True)],
        cmdclass={"build_ext": NinjaBuild},
    )
