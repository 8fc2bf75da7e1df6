"""`python -m fastlm` is the command `fastlm`."""

from fastlm.cli import main

main(prog_name="fastlm")
