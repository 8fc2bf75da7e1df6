"""Runs tests of operators on emulated kernels: `python tester.py PACKAGE LIBRARY`.

Each line of its input is a request, {"stem", "folder", "tests", "said"}; a child of this process
serves it, and the child's exit status is the answer. So PyTorch is imported once, and a child that
crashes takes nothing with it.
"""

from __future__ import annotations

import json
import os
import sys
import types


def main() -> None:
    package, library = sys.argv[1:]
    sys.path.insert(0, package)
    # Operators' tests import this for what torch.compile does, which nobody asks here: some 6 s.
    absent = types.ModuleType("torch._dynamo.testing")
    absent.CompileCounterWithBackend = None
    sys.modules[absent.__name__] = absent
    import pytest
    import torch

    torch.ops.load_library(library)
    from fastlm import _ext, ops, testing

    assert _ext.native.cpu_isa() == "emulated CUDA"
    # What PyTorch imports at the first call, some 2 s, is there for all children.
    testing.check(ops.rms_norm, ops.rms_norm, ops.rms_norm, [torch.ones(2, 4)], draws=1)
    print("ready", flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            _ext.native_stems = frozenset([request["stem"]])  # the others: the reference
            said = os.open(request["said"], os.O_WRONLY | os.O_CREAT)
            os.dup2(said, 1)
            os.dup2(said, 2)
            os.chdir(request["folder"])
            sys.path.insert(0, request["folder"])
            status = int(pytest.main(["-q", "-p", "no:cacheprovider", *request["tests"]]))
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


if __name__ == "__main__":
    main()
