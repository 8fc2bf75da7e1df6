"""Finds torch and CUDA, writes build.ninja, compiles csrc/ into fastlm/_C.so and fastlm/_cuda.so.

torch is never imported here, so the same code works inside pip's isolated build, in an editable
install and offline. One row of kernels is one stem X: `csrc/cpu/X.h` is compiled once per
instruction set (through csrc/cpu/target.cpp), `csrc/torch/X.cpp` once, `csrc/cuda/X.cu` once.
"""

from __future__ import annotations

import importlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parent.parent
MIN_TORCH = "2.11"
ABI_TARGET = "0x020b000000000000"  # libtorch stable ABI of torch 2.11
DEFAULT_CUDA_ARCHS = "8.0;8.6;8.9;9.0a;10.0a;12.0+PTX"
# Whose intermediate code (PTX) an architecture takes: the kernels' is the same text, made once.
PTX_OF = {"86": "80", "89": "80", "100a": "100", "120": "100"}
NVCC_FLAGS = "-std=c++20 -O3 -Werror all-warnings"

# Compiler flags per instruction set; csrc/cpu/isa.cpp lists the same names, worst first.
X86 = "-mavx2 -mfma -mf16c"
AVX512 = f"{X86} -mavx512f -mavx512bw -mavx512vl -mavx512dq -mprefer-vector-width=512"
ISA_FLAGS = {
    "baseline": "",
    "avx2": X86,
    "avx512": AVX512,
    "avx512bf16": f"{AVX512} -mavx512bf16 -mavx512vnni",
    # Tiles are given back by a destructor; what runs it after a throw, and nothing throws, would
    # be a weak symbol of the object. (For every set it would cost: RMS norm's backward 4.5 % more.)
    "amx": f"{AVX512} -mavx512bf16 -mavx512vnni -mamx-tile -mamx-bf16 -fno-exceptions",
}
# What Linux calls what a set needs, beyond the one before it.
CPUINFO = {
    "baseline": "",
    "avx2": "avx2 fma f16c",
    "avx512": "avx512f avx512bw avx512vl avx512dq",
    "avx512bf16": "avx512_bf16 avx512_vnni",
    "amx": "amx_tile amx_bf16",
}


class BuildError(RuntimeError):
    """Something the build needs is missing; the text says what and how to get it."""


class NoCompiler(BuildError):
    """No C++ compiler: the one thing fastlm can be installed without."""


def _site_packages() -> Iterator[str]:
    yield from sys.path  # no isolation, or torch in the build environment
    yield sysconfig.get_paths()["platlib"]  # pip's isolation: the environment installed into
    yield sysconfig.get_paths()["purelib"]
    venv = os.environ.get("VIRTUAL_ENV")  # uv's isolation
    if venv:
        version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
        yield os.path.join(venv, "lib", version, "site-packages")


def find_torch() -> Path | None:
    """The torch package directory of the environment being installed into, or None."""
    override = os.environ.get("FASTLM_TORCH_DIR")
    if override:
        if not (Path(override) / "version.py").exists():
            raise BuildError(f"FASTLM_TORCH_DIR: no torch package in {override}")
        return Path(override)
    for folder in _site_packages():
        torch = Path(folder or ".") / "torch"
        if (torch / "include/torch/csrc/stable/library.h").exists():
            return torch
    return None


def torch_version(torch: Path) -> tuple[str, str | None]:
    """(version, CUDA version or None), read from torch/version.py without importing torch."""
    namespace: dict[str, str | None] = {}
    exec((torch / "version.py").read_text(), namespace)
    return str(namespace["__version__"]), namespace.get("cuda")


def find_cuda() -> Path | None:
    """The CUDA toolkit root, or None; an nvcc that is a wrapper script is asked for its root."""
    for root in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if root and (Path(root) / "bin/nvcc").exists() and _has_runtime(Path(root)):
            return Path(root)
    nvcc = shutil.which("nvcc")
    if nvcc:
        dryrun = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True, cwd="/")
        top = re.search(r"TOP=(\S+)", dryrun.stderr)
        if top and _has_runtime(Path(top[1]).resolve()):
            return Path(top[1]).resolve()
    return None


def _has_runtime(root: Path) -> bool:
    return (root / "include/cuda_runtime.h").exists()


def cuda_arch_flags() -> list[str]:
    """nvcc -gencode flags from TORCH_CUDA_ARCH_LIST ("8.0;9.0a;10.0a", "+PTX" understood)."""
    flags: list[str] = []
    wanted = os.environ.get("TORCH_CUDA_ARCH_LIST", DEFAULT_CUDA_ARCHS).replace(" ", ";")
    for arch in filter(None, wanted.split(";")):
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", arch):
            form = "numbers such as 8.0;9.0a;12.0+PTX"
            raise BuildError(f"TORCH_CUDA_ARCH_LIST: expected {form}, got {arch!r}")
        number = arch.removesuffix("+PTX").replace(".", "")
        flags.append(cuda_code(number))
        if arch.endswith("+PTX"):
            ptx = PTX_OF.get(number, number)
            flags.append(f"-gencode arch=compute_{ptx},code=compute_{ptx}")
    return flags


def cuda_code(number: str) -> str:
    """nvcc's flag for the machine code of one architecture, 90a."""
    return f"-gencode arch=compute_{PTX_OF.get(number, number)},code=sm_{number}"


def use_cuda(torch_cuda: str | None, cuda: Path | None) -> bool:
    """FASTLM_CUDA=0|1|auto; auto builds the CUDA library where nvcc is and torch has CUDA."""
    wanted = os.environ.get("FASTLM_CUDA", "auto")
    if wanted not in ("0", "1", "auto"):
        raise BuildError(f"FASTLM_CUDA: expected 0, 1 or auto, got {wanted!r}")
    if wanted == "1" and cuda is None:
        raise BuildError("FASTLM_CUDA=1 but no CUDA toolkit was found; set CUDA_HOME")
    return wanted == "1" or (wanted == "auto" and cuda is not None and torch_cuda is not None)


def is_x86() -> bool:
    return sysconfig.get_platform().endswith(("x86_64", "amd64"))


def instruction_sets(x86: bool) -> list[str]:
    """The sets every kernel is compiled for; elsewhere the one in GCC's vector extensions.

    FASTLM_BUILD_ISAS=native leaves out those that this processor has not: half the time of a build
    that stays on its machine.
    """
    wanted = os.environ.get("FASTLM_BUILD_ISAS", "all")
    if wanted not in ("all", "native"):
        raise BuildError(f"FASTLM_BUILD_ISAS: expected all or native, got {wanted!r}")
    if not x86:
        return ["baseline"]
    found = re.search(r"^flags\s*:(.*)", _cpuinfo(), re.M) if wanted == "native" else None
    if found is None:
        return list(ISA_FLAGS)
    here = set(found[1].split())
    return list(itertools.takewhile(lambda isa: here.issuperset(CPUINFO[isa].split()), ISA_FLAGS))


def _cpuinfo() -> str:
    file = Path("/proc/cpuinfo")
    return file.read_text() if file.exists() else ""


def compile_flags(x86: bool, torch: Path | None = None) -> str:
    """Compiler flags for x86 or any other processor; the bindings' with torch's directory."""
    flags = "-O3 -g0 -std=c++20 -fPIC -fvisibility=hidden -fno-math-errno -fno-trapping-math "
    flags += "-ffp-contract=fast -Wall -Wextra -Wno-psabi "
    flags += "-Wno-maybe-uninitialized -Wno-uninitialized "  # GCC 12 in its own AVX-512 headers
    headers = f"-isystem {torch / 'include'} " if torch else ""
    flags += f"-I{ROOT / 'csrc'} {headers}-DFASTLM_X86={int(x86)}"
    if torch:
        flags += f" -DTORCH_TARGET_VERSION={ABI_TARGET} -DTORCH_STABLE_ONLY"
    return flags


def kernel_stems() -> list[str]:
    """The rows with CPU kernels of their own: contract, kernels and binding of one name."""
    stems = [file.stem for file in sorted((ROOT / "csrc/ops").glob("*.h"))]
    files = "cpu/{}.h", "torch/{}.cpp"
    return [s for s in stems if all((ROOT / "csrc" / f.format(s)).exists() for f in files)]


def kernel_object(ninja: Ninja, stem: str, isa: str) -> str:
    """Adds a row's kernels for one instruction set; returns the object's path."""
    flags = f"{ISA_FLAGS[isa]} -DFASTLM_ISA={isa} -DFASTLM_STEM={stem}"
    return ninja.build("cxx", ROOT / "csrc/cpu/target.cpp", f"{stem}.{isa}.o", extra=flags)


def kernel_sources(stem: str) -> list[Path]:
    """The header of a row's CPU kernels and what it includes of ours, directly or not."""
    found = [ROOT / f"csrc/cpu/{stem}.h"]
    for source in found:  # grows
        for name in re.findall(r'^#include "([^"]+)"', source.read_text(), re.M):
            if (ROOT / "csrc" / name) not in found:
                found.append(ROOT / "csrc" / name)
    return found


def twin(stem: str, isa: str, isas: list[str]) -> str | None:
    """The set whose object serves this one too: amx adds tiles alone, and few rows have any.

    A set that is not built takes the last that is, for the linker's sake: it is never chosen.
    """
    if isa not in isas:
        return twin(stem, isas[-1], isas) or isas[-1]
    tiles = any("__AMX_" in source.read_text() for source in kernel_sources(stem))
    return None if tiles or isa != "amx" else "avx512bf16"


def table_symbol(stem: str, isa: str) -> str:
    """The linker's name of fastlm::amx::rope, a row's table of kernels."""
    return f"_ZN6fastlm{len(isa)}{isa}{len(stem)}{stem}E"


class Ninja:
    """Collects build.ninja: rules first, then one line per file."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[str] = []

    def rule(self, name: str, command: str, depfile: bool = True) -> None:
        self.lines += [f"rule {name}", f"  command = {command}", f"  description = {name} $short"]
        if depfile:
            self.lines += ["  depfile = $out.d", "  deps = gcc"]

    def build(self, rule: str, source: Path, output: str, **variables: str) -> str:
        """Adds one object file made from one source; returns its path."""
        target = str(self.folder / output)
        self.lines += [f"build {target}: {rule} {source}", f"  short = {output}"]
        self.lines += [f"  {name} = {value}" for name, value in variables.items()]
        return target

    def link(self, output: Path, objects: list[str], libs: str) -> None:
        self.lines += [f"build {output}: link {' '.join(objects)}", f"  libs = {libs}"]
        self.lines.append(f"  short = {output.name}")

    def write(self) -> None:
        text = "\n".join(self.lines) + "\n"
        file = self.folder / "build.ninja"
        if not file.exists() or file.read_text() != text:
            file.write_text(text)

    def run(self, targets: list[str]) -> None:
        """Brings the targets up to date; MAX_JOBS limits the processes."""
        program = shutil.which("ninja")
        command = [program] if program else [sys.executable, "-m", require_tool("ninja").__name__]
        command += ["-C", str(self.folder)]
        if os.environ.get("MAX_JOBS"):
            command += ["-j", os.environ["MAX_JOBS"]]
        subprocess.run([*command, *targets], check=True)


def require_compiler() -> str:
    """The C++ compiler command, $CXX or g++; raises where its program is missing."""
    compiler = os.environ.get("CXX", "g++")
    words = shlex.split(compiler)
    if words and Path(words[0]).name in ("ccache", "sccache", "distcc"):
        words = words[1:]
    if not words or shutil.which(words[0]) is None:
        raise NoCompiler(f"no C++ compiler: {compiler!r} not found; install g++ or set CXX")
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").exists():
        raise NoCompiler(f"no Python.h in {headers}; install Python's headers (python3-dev)")
    return compiler


def require_tool(name: str) -> ModuleType:
    """A Python package the build needs, which pip brings unless build isolation is off."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise BuildError(f"{name} is not installed; `pip install ninja pybind11` first") from None


def build(outdir: Path, ext_suffix: str, tmp: Path, *, only: str | None = None) -> list[Path]:
    """Compiles everything that changed; returns the libraries written to outdir.

    `only` names one library to build ("_cuda.so") instead of all.

    Raises NoCompiler where there is no compiler, BuildError where something else is missing, and
    subprocess.CalledProcessError where a file does not compile.
    """
    compiler = require_compiler()
    torch = find_torch()
    if torch is None:
        raise BuildError(
            f"torch>={MIN_TORCH} not found; `pip install torch` first, or set FASTLM_TORCH_DIR"
        )
    version, torch_cuda = torch_version(torch)
    cuda = find_cuda()
    with_cuda = use_cuda(torch_cuda, cuda)
    pybind11 = require_tool("pybind11").get_include()

    tmp, outdir = tmp.absolute(), outdir.absolute()
    tmp.mkdir(parents=True, exist_ok=True)
    outdir.mkdir(parents=True, exist_ok=True)

    flags = compile_flags(is_x86(), torch)
    # Only the module sees what changes from one build environment to the next.
    module = f"-isystem {pybind11} -isystem {sysconfig.get_paths()['include']} "
    module += f'-DFASTLM_TORCH_VERSION=\\"{version}\\" -DFASTLM_WITH_CUDA={int(with_cuda)}'

    ninja = Ninja(tmp)
    ninja.lines += [f"cxx = {compiler}", f"flags = {flags}"]
    ninja.rule("cxx", "$cxx -MMD -MF $out.d $flags $extra -c $in -o $out")
    ninja.rule("link", "$cxx -shared -Wl,--gc-sections -s $in -o $out $libs", depfile=False)

    libs = f"-L{torch / 'lib'} -ltorch_cpu -lc10"
    written = []
    if with_cuda:  # begins with what takes longest, so that no file is compiled alone at the end
        assert cuda is not None
        written.append(_cuda_library(ninja, cuda, outdir, libs))
    else:
        (outdir / "_cuda.so").unlink(missing_ok=True)  # of an earlier build

    csrc = ROOT / "csrc"
    stems = kernel_stems()
    bindings = sorted((csrc / "torch").glob("*.cpp"))
    bound = (binding.stem for binding in bindings if binding.stem != "module")
    module += f' -DFASTLM_STEMS=\\"{",".join(bound)}\\"'
    x86 = is_x86()
    isas = instruction_sets(x86)
    # The number of them, and isa.cpp takes none beyond.
    built = f"-DFASTLM_ISAS={len(isas)}"
    objects = [ninja.build("cxx", csrc / "cpu/isa.cpp", "isa.o", extra=built)]
    aliases = ""
    for binding in bindings:
        stem = binding.stem
        extra = module if stem == "module" else ""
        objects.append(ninja.build("cxx", binding, f"{stem}.o", extra=extra))
        for isa in (ISA_FLAGS if x86 else isas) if stem in stems else ():
            same = twin(stem, isa, isas)
            if same is None:
                objects.append(kernel_object(ninja, stem, isa))
            else:
                names = table_symbol(stem, isa), table_symbol(stem, same)
                aliases += f" -Wl,--defsym,{'='.join(names)}"
    library = outdir / f"_C{ext_suffix}"
    ninja.link(library, objects, libs + aliases)
    written.append(library)

    ninja.write()
    if only is not None:
        written = [library for library in written if library.name == only]
    ninja.run([str(library) for library in written])
    print(f"fastlm: built against torch {version}, CUDA kernels: {with_cuda}", flush=True)
    return written


def cuda_kernels() -> list[Path]:
    """The files of csrc/cuda, those that take longest first."""
    return sorted((ROOT / "csrc/cuda").glob("*.cu"), key=lambda file: -file.stat().st_size)


def cuda_bindings() -> list[Path]:
    """The files of csrc/torch/cuda."""
    return sorted((ROOT / "csrc/torch/cuda").glob("*.cpp"))


def objects_folder() -> Path:
    """Where objects stay, so that a second build is a no-op."""
    return ROOT / f"build/native-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"


def _cuda_library(ninja: Ninja, cuda: Path, outdir: Path, libs: str) -> Path:
    """Rules for fastlm/_cuda.so: torch-free kernels and one stable-ABI binding per folder.

    The CUDA runtime is linked statically, so the library loads without a GPU or a CUDA torch.
    """
    csrc = ROOT / "csrc"
    ccbin = os.environ.get("NVCC_CCBIN") or os.environ.get("CXX")
    nvcc = f"{cuda / 'bin/nvcc'}" + (f" -ccbin {shlex.split(ccbin)[-1]}" if ccbin else "")
    threads = os.environ.get("NVCC_THREADS", "1")
    flags = f"{NVCC_FLAGS} -Xfatbin -compress-all "
    flags += f"-Xcompiler -fPIC,-fvisibility=hidden --threads {threads} "
    flags += f"-I{csrc} -I{csrc / 'cuda'} "
    archs = cuda_arch_flags()
    if len(archs) == 1:  # for the GPU at hand, where profilers and sanitizers name lines
        flags += "-lineinfo "
    flags += " ".join(archs)
    ninja.lines += [f"nvcc = {nvcc}", f"nvflags = {flags}"]
    ninja.rule("cuda", "$nvcc -MMD -MF $out.d $nvflags -c $in -o $out")
    objects = [ninja.build("cuda", kernel, f"{kernel.stem}.cu.o") for kernel in cuda_kernels()]
    extra = f"-DUSE_CUDA -isystem {cuda / 'include'}"
    for binding in cuda_bindings():
        objects.append(ninja.build("cxx", binding, f"{binding.stem}.cuda.o", extra=extra))
    library = outdir / "_cuda.so"
    ninja.link(library, objects, f"{libs} -L{cuda}/lib64 -lcudart_static -ldl -lrt -lpthread")
    return library


if __name__ == "__main__":  # in place, without setuptools
    try:
        build(ROOT / "fastlm", str(sysconfig.get_config_var("EXT_SUFFIX")), objects_folder())
    except BuildError as error:
        raise SystemExit(f"fastlm: {error}") from error
    except subprocess.CalledProcessError:
        raise SystemExit("fastlm: the compiler's message is above") from None
