"""Builds the native libraries; everything but that is in pyproject.toml."""

import filecmp
import os
import shutil
import sys
import warnings
from pathlib import Path

from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "build_support"))
import native  # noqa: E402  (needs the line above)


class NativeBuild(build_ext):
    """Hands the one extension to ninja; without a compiler the package installs without it."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        suffix = target.name.removeprefix("_C")
        # Objects stay in the source tree whatever pip does, so that a second build is a no-op.
        try:
            native.build(target.parent, suffix, native.objects_folder())
        except native.NoCompiler as missing:
            if os.environ.get("FASTLM_REQUIRE_NATIVE") == "1":
                raise SystemExit(f"fastlm: {missing}") from missing
            warnings.warn(f"fastlm installs without native kernels: {missing}", stacklevel=1)
        except native.BuildError as error:
            raise SystemExit(f"fastlm: {error}") from error

    def copy_extensions_to_source(self) -> None:
        """Editable installs: put the libraries beside the sources, unless the same lie there."""
        built, source = Path(self.build_lib) / "fastlm", ROOT / "fastlm"
        for library in built.glob("*.so"):
            target = source / library.name
            if target.exists() and filecmp.cmp(library, target, shallow=False):
                continue
            fresh = target.with_suffix(".new")  # a running process keeps the old file
            shutil.copy2(library, fresh)
            fresh.replace(target)
        if any(built.glob("_C*.so")) and not (built / "_cuda.so").exists():
            (source / "_cuda.so").unlink(missing_ok=True)


# pip is asked to bring torch only where the environment being installed into has none; a bare
# `python setup.py` never downloads anything.
by_pip = "setuptools.build_meta" in sys.modules
needs_torch = by_pip and native.find_torch() is None

setup(
    packages=find_packages(include=["fastlm*"])
    + [f"fastlm.{name}" for name in find_packages(include=["benchmarks*"])],
    package_dir={"fastlm.benchmarks": "benchmarks"},
    ext_modules=[Extension("fastlm._C", sources=[], optional=True)],
    cmdclass={"build_ext": NativeBuild},
    setup_requires=[f"torch>={native.MIN_TORCH}"] if needs_torch else [],
)
