"""Builds the C++ extensions with ninja; everything else about the package is in pyproject.toml.

`_cpu` needs a C++17 compiler, `_cuda` the same on Linux, and neither needs torch: they take
pointers. The CUDA kernels inside `_cuda` need nvcc as well. What cannot be built is left out: the
package installs, runs on what is there, and says so here and in `proxsparse env`. The environment
variable PROXSPARSE_BUILD forces the choice: `cuda` fails unless everything is built, `cpu` fails
unless `_cpu` is and leaves `_cuda` out, `none` leaves out both.
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
from setuptools.command.bdist_wheel import bdist_wheel
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
CUDA_FLAGS = [
    *("-std=c++17", "-O3", "-Xcompiler=-fPIC,-fvisibility=hidden", "-Xcompiler=-Wall"),
]
# Machine code for Ampere and Ada; from the PTX, which may use clusters, the driver compiles for
# what comes after Hopper. Hopper's own instructions are in files of their own, *_hopper.cu.
EVERY_GPU = ["-gencode=arch=compute_80,code=sm_80", "-gencode=arch=compute_90,code=compute_90"]
HOPPER = ["-gencode=arch=compute_90a,code=sm_90a"]
# nvcc links, and brings the runtime in statically: the machine that runs it needs only a driver.
CUDA_LINK_FLAGS = "-shared -cudart static"
KERNELS = "cuda_kernels"  # the .cu sources of `_cuda`, in what is built and what is left out
PARTS = ("_cpu", "_cuda", KERNELS)

NINJA_RULES = """\
rule compile
  command = $cxx $cflags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $in
rule compile_cuda
  command = $nvcc $cudaflags -MMD -MF $out.d -c $in -o $out
  depfile = $out.d
  deps = gcc
  description = compile $in
rule link
  command = $linker $in $ldflags -o $out
  description = link $out
"""


def find_compiler() -> list[str] | None:
    """The command of a C++ compiler, from CXX or the usual names on PATH."""
    command = shlex.split(os.environ.get("CXX", ""))
    if command:
        return command if shutil.which(command[0]) else None
    return next(([name] for name in ("c++", "g++", "clang++") if shutil.which(name)), None)


def find_nvcc() -> str | None:
    """The CUDA compiler: in CUDA_HOME, on PATH or where NVIDIA's installers put it."""
    homes = [os.environ["CUDA_HOME"]] if os.environ.get("CUDA_HOME") else []
    folders = [os.path.join(home, "bin") for home in homes]
    folders += [os.environ.get("PATH", ""), "/usr/local/cuda/bin"]
    return shutil.which("nvcc", path=os.pathsep.join(filter(None, folders)))


def choose_build(
    forced: str, has_compiler: bool, has_nvcc: bool, has_kernels: bool, platform: str
) -> dict[str, str]:
    """Which of PARTS to leave out, and the reason for each.

    Args:
        forced: the value of PROXSPARSE_BUILD, empty for the automatic choice.
        has_compiler: whether a C++ compiler was found.
        has_nvcc: whether a CUDA compiler was found.
        has_kernels: whether there is CUDA source to compile.
        platform: `sys.platform`.

    Raises:
        SetupError: the value is unknown, or what it forces is impossible.
    """
    if forced not in ("", *CHOICES):
        raise SetupError(f"PROXSPARSE_BUILD is {forced!r}: it must be one of {', '.join(CHOICES)}")
    if forced == "none":
        return dict.fromkeys(PARTS, "PROXSPARSE_BUILD=none")
    left_out = {}
    if not has_compiler:
        reason = "no C++ compiler was found (looked for $CXX, c++, g++ and clang++)"
        left_out = dict.fromkeys(PARTS, reason)
    elif platform != "linux":
        left_out = dict.fromkeys(("_cuda", KERNELS), f"CUDA is for Linux, this is {platform}")
    elif not has_nvcc:
        places = "looked in $CUDA_HOME/bin, PATH and /usr/local/cuda/bin"
        left_out = {KERNELS: f"no nvcc was found ({places})"}
    required = {"": (), "cpu": ("_cpu",), "cuda": PARTS}[forced]
    for part in required:
        if part in left_out:
            raise SetupError(f"PROXSPARSE_BUILD={forced}, but {left_out[part]}")
    if not has_kernels:
        left_out.setdefault(KERNELS, "csrc/cuda has no .cu file to compile")
    if forced == "cpu":
        left_out |= dict.fromkeys(("_cuda", KERNELS), "PROXSPARSE_BUILD=cpu")
    return left_out


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
    folder: Path, target: Path, sources: list[Path], variables: dict[str, str], module_cflags: str
) -> None:
    """Writes folder/build.ninja, which compiles each source in parallel and links `target`.

    ninja compares commands and follows headers, so a second build compiles what changed. Only
    module.cpp gets `module_cflags`: build isolation moves pybind11 with every build.

    Args:
        folder: of the build file and the objects.
        target: the extension module.
        sources: .cpp and .cu files.
        variables: of NINJA_RULES, as the shell reads them, but for `cudaflags`.
        module_cflags: the cflags of module.cpp.
    """
    lines = [f"{name} = {value.replace('$', '$$')}" for name, value in variables.items()]
    lines.append(NINJA_RULES)
    objects = []
    for source in sources:
        objects.append(escape(folder / f"{source.stem}.o"))
        rule = "compile_cuda" if source.suffix == ".cu" else "compile"
        lines.append(f"build {objects[-1]}: {rule} {escape(source)}")
        if source.name == "module.cpp":
            lines.append(f"  cflags = {module_cflags.replace('$', '$$')}")
        if is_cuda(source):
            gpus = HOPPER if source.stem.endswith("_hopper") else EVERY_GPU
            lines.append(f"  cudaflags = {shlex.join([*CUDA_FLAGS, *gpus])}")
    lines.append(f"build {escape(target)}: link {' '.join(objects)}")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines) + "\n")


class NinjaBuild(build_ext):
    """build_ext whose compiling and linking is ninja's."""

    def build_extensions(self) -> None:
        """Builds what can be built, and keeps the reasons for the rest beside the package.

        Raises:
            SetupError: PROXSPARSE_BUILD forces what is impossible here.
        """
        forced = os.environ.get("PROXSPARSE_BUILD", "")
        self.left_out = choose_build(
            forced,
            find_compiler() is not None,
            find_nvcc() is not None,
            any(is_cuda(source) for extension in self.extensions for source in extension.sources),
            sys.platform,
        )
        for extension in self.extensions:
            part = extension.name.removeprefix("proxsparse.")
            if part not in self.left_out:
                self.build_or_leave_out(extension, part, forced)
        package = ROOT / "proxsparse" if self.editable_mode else Path(self.build_lib, "proxsparse")
        package.mkdir(parents=True, exist_ok=True)
        self.compiled = [part for part in PARTS if part not in self.left_out]
        for part in PARTS:
            note = package / f"_build_error_{part.strip('_')}.txt"
            if part not in self.left_out:
                note.unlink(missing_ok=True)
                continue
            for stale in package.glob(f"{part}.*.so"):
                stale.unlink()
            note.write_text(self.left_out[part] + "\n")
        if "bdist_wheel" not in self.distribution.command_obj:  # which tells it at its end
            self.tell()

    def tell(self) -> None:
        """Say what was compiled, and what was left out and why."""
        report(f"compiled: {', '.join(self.compiled) or 'nothing'}")
        for part, reason in self.left_out.items():
            report(f"left out: {part}, because {reason}")
        if "_cpu" in self.left_out:
            report("ops on CPU tensors will run on the PyTorch reference, which is much slower")

    def build_or_leave_out(self, ext: Extension, part: str, forced: str) -> None:
        """Builds one extension; where the compiler fails, without its CUDA kernels or not at all.

        Raises:
            CompileError: it is forced and fails.
        """
        while True:
            try:
                return self.build_extension(ext)
            except CompileError as error:
                if forced:
                    raise
                has_kernels = part == "_cuda" and KERNELS not in self.left_out
                self.left_out[KERNELS if has_kernels else part] = str(error)
                if not has_kernels:
                    return None

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
        sources = [ROOT / source for source in ext.sources]
        linker = shlex.join(compiler)
        nvcc = find_nvcc() or "nvcc"
        if ext.name == "proxsparse._cpu":
            if compiles(compiler, ["-fopenmp"]):
                cflags, ldflags = [*cflags, "-fopenmp"], ldflags + " -fopenmp"
            else:
                report(f"{compiler[0]} has no OpenMP: {ext.name} will use one thread")
        elif KERNELS in self.left_out:
            sources = [source for source in sources if not is_cuda(source)]
            ldflags += " -ldl"
        else:
            cflags = [*cflags, "-DPROXSPARSE_HAS_KERNELS"]
            linker, ldflags = shlex.quote(nvcc), CUDA_LINK_FLAGS + " -ldl"
        target = Path(self.get_ext_fullpath(ext.name)).absolute()
        target.parent.mkdir(parents=True, exist_ok=True)
        machine = f"ninja-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        folder = ROOT / "build" / machine / ext.name.rpartition(".")[2]
        includes = (pybind11.get_include(), sysconfig.get_path("include"))
        variables = {
            "cxx": shlex.join(compiler),
            "cflags": shlex.join(cflags),
            "nvcc": shlex.quote(nvcc),
            "linker": linker,
            "ldflags": ldflags,
        }
        module_cflags = shlex.join([*cflags, *(f"-I{include}" for include in includes)])
        write_ninja(folder, target, sources, variables, module_cflags)
        if subprocess.run([ninja, "-C", str(folder)]).returncode:
            raise CompileError("the compiler failed; `pip install -v` shows its messages")


class TaggedWheel(bdist_wheel):
    """bdist_wheel whose tag says whether anything is compiled in it."""

    def finalize_options(self) -> None:
        """Decides the tag before anything is built: a wheel without machine code is any machine's.

        A compiler that is there and fails leaves a wheel without machine code too, whose tag then
        promises less than it could.
        """
        super().finalize_options()
        has_kernels = any(is_cuda(s) for e in self.distribution.ext_modules for s in e.sources)
        left_out = choose_build(
            os.environ.get("PROXSPARSE_BUILD", ""),
            find_compiler() is not None,
            find_nvcc() is not None,
            has_kernels,
            sys.platform,
        )
        self.is_pure = {"_cpu", "_cuda"} <= set(left_out)

    def get_tag(self) -> tuple[str, str, str]:
        """py3-none-any where nothing is compiled."""
        return ("py3", "none", "any") if self.is_pure else super().get_tag()

    def run(self) -> None:
        """Builds the wheel; the last lines say what is in it."""
        super().run()
        build = self.distribution.command_obj.get("build_ext")
        if isinstance(build, NinjaBuild) and hasattr(build, "compiled"):
            build.tell()


def is_cuda(source: str | Path) -> bool:
    """Whether nvcc compiles it."""
    return Path(source).suffix == ".cu"


def find_sources(folder: str) -> list[str]:
    """The sources of one extension, relative to this file."""
    paths = (ROOT / "csrc" / folder).glob("*.c*")
    return sorted(str(path.relative_to(ROOT)) for path in paths)


if __name__ == "__main__":
    setup(
        packages=[
            *find_packages(include=["proxsparse", "proxsparse.*"]),
            *("proxsparse.demo_model", "proxsparse.kernels"),
        ],
        package_dir={"proxsparse.kernels": "kernels"},
        package_data={
            "proxsparse": ["py.typed", "backends/tables/*.json"],
            "proxsparse.demo_model": ["*"],
        },
        # optional: whether they are built is decided in NinjaBuild.
        ext_modules=[
            Extension(f"proxsparse._{name}", find_sources(name), optional=True)
            for name in ("cpu", "cuda")
        ],
        cmdclass={"build_ext": NinjaBuild, "bdist_wheel": TaggedWheel},
    )
