"""The command line. Each file X.py here that has a click command named `command` is `fastlm X`.

Commands are imported when they run, so that `fastlm --help` is quick and a missing extra breaks
only the command that needs it.
"""

from __future__ import annotations

import importlib
import pkgutil

import click

from fastlm._version import __version__

# Package that may be missing -> the extra that brings it.
_EXTRAS = {
    "gguf": "gguf",
    "jinja2": "hf",
    "lm_eval": "lm-eval",
    "matplotlib": "demo",
    "psutil": "demo",
    "rich": "demo",
    "rouge_score": "metrics",
    "sacrebleu": "metrics",
    "transformers": "hf",
}


class Commands(click.Group):
    """Finds commands by file name."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(
            module.name.replace("_", "-")
            for module in pkgutil.iter_modules(__path__)
            if not module.name.startswith("_")
        )

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self.list_commands(ctx):
            return None
        module = importlib.import_module(f"fastlm.cli.{cmd_name.replace('-', '_')}")
        command: click.Command = module.command
        return command

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except ModuleNotFoundError as error:
            extra = _EXTRAS.get((error.name or "").partition(".")[0])
            if extra is None:
                raise
            raise click.ClickException(
                f"this needs the package {error.name}: pip install 'fastlm[{extra}]'"
            ) from error


@click.group(cls=Commands, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="fastlm")
def main() -> None:
    """Fused kernels that make decoder language models run fast.

    \b
    Example:
      fastlm info
    """
