"""Settings for all tests."""

import os
import signal

import hypothesis
import onnxruntime
import torch


class _OneThread(onnxruntime.SessionOptions):
    """Sessions that are told no number of threads use one."""

    def __init__(self):
        super().__init__()
        self.intra_op_num_threads = 1


# The same examples on every run; and no deadline, since a busy machine is not a bug.
hypothesis.settings.register_profile("sparsify", deadline=None, derandomize=True)
hypothesis.settings.load_profile("sparsify")

# Workers side by side (pytest -n) share the cores; of several threads each, they wait for one another, spinning.
if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
    onnxruntime.SessionOptions = _OneThread

# A run in the background of a shell inherits that Ctrl-C is ignored; the tests of Ctrl-C, and what they start, want it.
signal.signal(signal.SIGINT, signal.default_int_handler)
