"""Runs the command many times, each in a forked process that has everything imported, and kills it where it is told.

``python warm_command.py`` under ``LD_PRELOAD`` of ``kill_at_step.c``. A line of JSON in is one run of
``python -m sparsify_export``: its arguments, the folder to run in, the step below that folder to die at (0: none) and
whether right before it. A line out tells how the run ended, as `os.waitpid` says it, its steps and what it printed.
"""

import ctypes
import json
import os
import runpy
import sys
import tempfile
from typing import Any

import torch
from sparsify_export import cli, compile  # noqa: F401  what takes seconds


def run(arguments: list[str], folder: str, step: int, before: bool) -> dict[str, Any]:
    """Fork, arm the counter in the child, and be the command there."""
    with tempfile.TemporaryFile() as steps, tempfile.TemporaryFile() as said:
        child = os.fork()
        if child == 0:
            os.chdir(folder)
            for stream in (sys.stdout, sys.stderr):
                os.dup2(said.fileno(), stream.fileno())
            ctypes.CDLL(None).kill_at_step(os.fsencode(folder), step, before, steps.fileno())
            sys.argv = ["sparsify-export", *arguments]
            code: Any = 1
            try:
                runpy.run_module("sparsify_export", run_name="__main__", alter_sys=True)
            except SystemExit as ended:
                code = ended.code or 0
            finally:
                sys.stdout.flush()
                os._exit(code)
        _, status = os.waitpid(child, 0)
        for log in (steps, said):
            log.seek(0)
        return {"status": status, "steps": steps.read().decode().splitlines(), "said": said.read().decode()}


if __name__ == "__main__":
    torch.set_num_threads(1)  # a fork has none of the threads that its parent had
    for line in sys.stdin:
        print(json.dumps(run(**json.loads(line))), flush=True)  # noqa: T201
