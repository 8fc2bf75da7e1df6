"""Builds the native libraries; everything but that is in pyproject.toml."""

import os
import shutil
import sys
import warnings
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

sys.path.insert(0, os.path.join(os.path.dirname(os.path.abspath(__file__)), "build_support"))
import native


class NativeBuild(build_ext):
    """Hands the one extension to ninja; without a compiler the package installs without it."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        suffix = target.name.removeprefix("_C")
        try:
            native.build(target.parent, suffix, Path(self.build_temp) / "native")
        except native.BuildError as error:
            if os.environ.get("FASTLM_REQUIRE_NATIVE") == "1":
                raise SystemExit(f"fastlm: {error}") from error
            warnings.warn(f"fastlm installs without native kernels: {error}", stacklevel=1)

    def copy_extensions_to_source(self) -> None:
        """Editable installs: put the libraries beside the sources."""
        built = Path(self.build_lib) / "fastlm"
        for library in [*built.glob("_C*.so"), *built.glob("_cuda.so")]:
            shutil.copy2(library, Path("fastlm") / library.name)


setup(
    ext_modules=[Extension("fastlm._C", sources=[], optional=True)],
    cmdclass={"build_ext": NativeBuild},
    # torch is asked for only where the environment being installed into has none
    setup_requires=[] if native.find_torch() else [f"torch>={native.MIN_TORCH}"],
)
