"""Runs in a Python that has onnxruntime-genai: for every line on stdin one run, its milliseconds as JSON on stdout.

    python genai_worker.py FOLDER THREADS

A line is ``CACHED STEPS``: decode so many tokens behind a prompt of CACHED; the median of a step counts. With 0 steps
the prompt itself is timed. The first line on stdout says that the model is ready. Ends with its stdin.
"""

import json
import os
import statistics
import sys
import time

answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what the library prints is not an answer

import numpy as np  # noqa: E402
import onnxruntime_genai as genai  # noqa: E402


def run(model: genai.Model, cached: int, steps: int, vocabulary: int) -> float:
    """Milliseconds of the prompt, or of a decoded token."""
    params = genai.GeneratorParams(model)
    most = cached + steps + 2
    params.set_search_options(max_length=most, min_length=most, do_sample=False)  # a random text must not end early
    generator = genai.Generator(model, params)
    ids = np.random.default_rng(0).integers(3, vocabulary, cached).astype(np.int32)
    begin = time.perf_counter()
    generator.append_tokens(ids)
    prompt = 1e3 * (time.perf_counter() - begin)
    if not steps:
        return prompt
    generator.generate_next_token()  # the logits are there already: this one runs nothing
    times = []
    for _ in range(steps):
        begin = time.perf_counter()
        generator.generate_next_token()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times)


def main(folder: str, threads: int) -> None:
    """Load and answer."""
    config = genai.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = genai.Model(config)
    with open(os.path.join(folder, "genai_config.json"), encoding="utf-8") as file:
        vocabulary = json.load(file)["model"]["vocab_size"]
    print(json.dumps({"version": genai.__version__}), file=answers, flush=True)
    for line in sys.stdin:
        cached, steps = map(int, line.split())
        print(json.dumps(run(model, cached, steps, vocabulary)), file=answers, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
