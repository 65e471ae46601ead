"""Hold the times that budgets predict against those of files: uniform forms, and choices at several speeds.

    python -P tools/budget_check.py $(python -P tools/smollm2.py) --calibration valid.txt --workload decode:64
    python -P tools/budget_check.py $(python -P tools/minilm.py) --calibration valid.txt --workload prefill:128x8

Nothing is corrected by what was measured. Damage is as estimated before an update of the weights.
"""

import sys
import tempfile
from pathlib import Path

from cyclopts import App
from sparsify_export.budget import Group, told_mix
from sparsify_export.budgeted import Subject, output_of, weigh
from sparsify_export.calibrate.budget import totals
from sparsify_export.calibrate.patterns import NM
from sparsify_export.calibrate.search import Goal, Scale, pick, predicted
from sparsify_export.passes.frontend.batches import read_windows, token_batches
from sparsify_export.passes.frontend.load import load
from sparsify_export.passes.frontend.trace import trace
from sparsify_export.passes.fx.canonical import canonicalise
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.recipe import Recipe
from sparsify_export.runtime.workload import Workload
from sparsify_export.settings import SILENT, Budget, Settings

app = App()


@app.default
def main(
    model: str,
    /,
    *,
    calibration: Path,
    workload: str = "decode:64",
    windows: int = 8,
    length: int = 256,
    speedups: tuple[float, ...] = (1.5, 2.0, 2.5),
    forms: tuple[str, ...] = ("dense int8", "dense int4 g32", "2:4 int8", "2:4 int4 g32"),
) -> None:
    """Predict and measure.

    Args:
        model: Hugging Face folder, hub id or GGUF file of a model that takes text.
        calibration: a text.
        workload: as ``--workload``.
        windows: of the text, that the damage is estimated from.
        length: tokens in a window.
        speedups: that are chosen for.
        forms: that all linears are given, where they can have them and were timed.
    """
    pretrained = load(model)
    traced = trace(pretrained)
    canonicalise(traced.program)
    parts = partition(traced.program)
    params = {**traced.program.constants, **{k: v.detach() for k, v in traced.program.state_dict.items()}}
    read = read_windows(calibration, pretrained.tokenizer, samples=windows, length=length)
    batches = token_batches(traced, read, names=pretrained.inputs, tokens_per_batch=length)
    subject = Subject(pretrained, traced, parts, params, batches, output_of(traced), lambda: trace(pretrained))
    budget = Budget(None, None, Workload.parse(workload), pattern=False)
    with tempfile.TemporaryDirectory() as folder:
        weighed = weigh(subject, Settings(Recipe(NM(2, 4)), budget=budget), Path(folder), SILENT)
        groups, options = weighed.groups, [group.options for group in weighed.groups]
        scale = Scale(1.0, weighed.dense.nbytes - totals(options, [0] * len(groups)).nbytes, weighed.dense.ms)
        picked = {f"all {name}": _uniform(groups, name) for name in forms}
        for speedup in speedups:
            picked[f"{speedup:g}x"] = pick(options, Goal(speedup), scale, weighed.dense.nbytes)[0]
        sys.stdout.write("choice\tpredicted ms\tmeasured ms\tdense ms\tspeed-up\tbytes\tdamage\tmix\n")
        for name, picks in picked.items():
            own = {key: group.forms[at] for group, at in zip(groups, picks, strict=True) for key in group.weights}
            found = weighed.trials.measure(own)
            saved = scale.dense_ms - predicted(options, picks, scale)[0]
            sys.stdout.write(
                f"{name}\t{found.dense_ms - saved:.2f}\t{found.ms:.2f}\t{found.dense_ms:.2f}\t{found.speedup:.2f}x\t"
                f"{found.size:.3f}\t{totals(options, picks).damage:.4g}\t{told_mix(groups, picks)}\n"
            )
            sys.stdout.flush()


def _uniform(groups: list[Group], name: str) -> tuple[int, ...]:
    """A form in all groups that can have it; dense in the others."""
    found = []
    for group in groups:
        names = [str(form) for form in group.forms]
        found.append(names.index(name) if name in names else 0)
    return tuple(found)


if __name__ == "__main__":
    app()
