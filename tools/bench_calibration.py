"""How much pruning costs beyond two plain forward passes of the blocks, and how much of it is the permutation search.

    python -P tools/bench_calibration.py MODEL TEXT [--samples 32] [--seq-len 1024]

Both sides run in one process on the same batches and threads. The floor is two passes: one to observe the dense block,
one to hand the pruned block's outputs on.
"""

import time
from pathlib import Path

from cyclopts import run
from sparsify_export.calibrate.patterns import NM
from sparsify_export.passes.frontend.batches import read_windows, token_batches
from sparsify_export.passes.frontend.load import load
from sparsify_export.passes.frontend.trace import trace
from sparsify_export.passes.fx.canonical import canonicalise
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.fx.run import live_after, run_part, start
from sparsify_export.passes.pipeline import prune
from sparsify_export.passes.recipe import Recipe, Timings


def main(model: str, text: Path, *, samples: int = 32, seq_len: int = 1024, score: str = "ria") -> None:
    """Measure, and print one line for each way of pruning."""
    pretrained = load(model)
    windows = read_windows(text, pretrained.tokenizer, samples=samples, length=seq_len)
    traced = trace(pretrained)
    canonicalise(traced.program)
    parts = partition(traced.program)
    batches = token_batches(traced, windows, names=pretrained.inputs)
    params = {**traced.program.constants, **{k: v.detach() for k, v in traced.program.state_dict.items()}}

    def forward() -> float:
        """Seconds for all blocks over all batches, once, without looking at anything."""
        alive = live_after(parts)
        states = [start(parts, batch.inputs) for batch in batches]
        seconds = 0.0
        for index, part in enumerate(parts.parts[:-1]):
            began = time.perf_counter()
            for values in states:
                values.update(run_part(part, values, params, parts.params))
                for name in [n for n in values if n not in alive[index]]:
                    del values[name]
            seconds += (time.perf_counter() - began) if part.path else 0.0
        return seconds

    passes = forward() + forward()
    print(f"two forward passes of the blocks over {windows.numel()} tokens: {passes:.1f} s")
    for permute in ("none", "fold"):
        timings = Timings()
        began = time.perf_counter()
        prune(parts, dict(params), Recipe(NM(2, 4), score, permute=permute), batches, timings=timings)  # type: ignore[arg-type]
        seconds = time.perf_counter() - began
        search = timings.seconds.get("permutation search", 0.0)
        print(
            f"2:4 {score}, permute {permute}: {seconds:.1f} s = {seconds / passes:.2f}x of two passes; "
            f"permutation search {search:.1f} s = {search / seconds:.1%}; "
            + ", ".join(f"{name} {value:.1f} s" for name, value in timings.seconds.items())
        )


if __name__ == "__main__":
    run(main)
