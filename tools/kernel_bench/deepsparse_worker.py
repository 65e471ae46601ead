"""Runs in a Python that has DeepSparse: for every line on stdin one run of the model, its seconds as JSON on stdout.

    python deepsparse_worker.py MODEL.onnx TOKENS THREADS

The first line on stdout says that the model is ready. Ends with its stdin.
"""

import json
import os
import sys
import time

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what DeepSparse prints is not an answer

import deepsparse  # noqa: E402
import numpy as np  # noqa: E402


def main(path: str, tokens: int, threads: int) -> None:
    """Load and answer."""
    engine = deepsparse.Engine(path, batch_size=tokens, num_cores=threads)
    shapes = engine.input_shapes
    x = np.random.default_rng(1).standard_normal(shapes[0]).astype(np.float32)
    clock = time.process_time if threads == 1 else time.perf_counter
    print(json.dumps({"version": deepsparse.__version__}), file=answers, flush=True)
    for _ in sys.stdin:
        start = clock()
        engine.run([x] * len(shapes), val_inp=False)
        print(json.dumps({"seconds": clock() - start}), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
