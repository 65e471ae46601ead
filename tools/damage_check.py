"""Hold the damage that budgets estimate against what changing one linear at a time really does to the model.

    python -P tools/damage_check.py $(python -P tools/minilm.py) --calibration valid.txt --text test.txt
    python -P tools/damage_check.py $(python -P tools/smollm2.py) --calibration valid.txt --text test.txt --every 7

Estimated on the first text as budgets do; measured on the second, of a language model as the divergence between its
predictions and those of the changed model (nats a token), else as the squared error of its output over its squared
norm. Printed for every form: Spearman's rank correlation over the linears, and the sum of the estimates over that of
what was measured.
"""

import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
from cyclopts import App
from scipy.stats import spearmanr  # type: ignore[import-untyped]
from sparsify_export.budgeted import output_of
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.calibrate.sums import total
from sparsify_export.passes.dialect.storage import FP32, Storage
from sparsify_export.passes.form import Form
from sparsify_export.passes.frontend.batches import Batch, read_windows, token_batches
from sparsify_export.passes.frontend.load import load
from sparsify_export.passes.frontend.trace import trace
from sparsify_export.passes.fx.canonical import canonicalise
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.fx.run import run_model, run_part_rounded
from sparsify_export.passes.sensitivity import witness
from torch import Tensor

FORMS = (
    Form(NM(2, 4), FP32),
    Form(Unstructured(0.5), FP32),
    Form(NM(2, 4), Storage("int8")),
    Form(None, Storage("int4", 32, blocked=True)),
    Form(None, Storage("int8", blocked=True)),
)

app = App()


@app.default
def main(
    model: str,
    /,
    *,
    calibration: Path,
    text: Path,
    length: int = 256,
    windows: int = 8,
    held_out: int = 4,
    every: int = 1,
) -> None:
    """Estimate and measure.

    Args:
        model: Hugging Face folder, hub id or GGUF file of a model that takes text.
        calibration: text that the estimate is made on.
        text: another, that is measured on.
        length: tokens in a window.
        windows: of the estimate.
        held_out: windows that are measured on.
        every: change only every so many-th linear.
    """
    pretrained = load(model)
    traced = trace(pretrained)
    canonicalise(traced.program)
    parts = partition(traced.program)
    params = {**traced.program.constants, **{k: v.detach() for k, v in traced.program.state_dict.items()}}
    output = output_of(traced)

    def batches(file: Path, count: int) -> list[Batch]:
        read = read_windows(file, pretrained.tokenizer, samples=count, length=length)
        return token_batches(traced, read, names=pretrained.inputs, tokens_per_batch=length)

    began = time.perf_counter()
    seen = witness(parts, params, batches(calibration, windows), output=output)
    sys.stdout.write(f"looked at {windows} windows of {length} tokens in {time.perf_counter() - began:.1f} s\n")
    own = batches(text, held_out)
    plain = partial(run_part_rounded, rounded={})
    with torch.no_grad():
        targets = [_said(batch.counted(run_model(parts, batch.inputs, params, plain)), output) for batch in own]
    sites = [((place, x.node), x) for place, part in enumerate(parts.blocks) for x in part.linears][::every]
    figures: dict[str, list[tuple[float, float]]] = {str(form): [] for form in FORMS}
    spent = SimpleNamespace(estimate=0.0, measure=0.0)
    for site, linear in sites:
        weight = params[linear.weight].float()
        forms = [form for form in FORMS if form.fits(linear.in_features)]
        began = time.perf_counter()
        changed = [(form.applied(weight, seen.norm([site])), form.storage.activations) for form in forms]
        estimates = seen.damage(site, weight, changed)
        spent.estimate += time.perf_counter() - began
        began = time.perf_counter()
        for form, (new, rounding), estimate in zip(forms, changed, estimates, strict=True):
            run = partial(run_part_rounded, rounded={linear.weight: rounding})
            wrong = size = 0.0
            for batch, target in zip(own, targets, strict=True):
                with torch.no_grad():
                    made = _said(
                        batch.counted(run_model(parts, batch.inputs, {**params, linear.weight: new}, run)), output
                    )
                logits = output == "logits"
                wrong += total(target.exp() * (target - made)) if logits else total((made - target).square())
                size += len(target) if logits else total(target.square())
            figures[str(form)].append((estimate, wrong / size))
        spent.measure += time.perf_counter() - began
    sys.stdout.write(f"{len(sites)} linears: estimated in {spent.estimate:.1f} s, measured in {spent.measure:.1f} s\n")
    for name, pairs in figures.items():
        estimated, measured = zip(*pairs, strict=True)
        order = spearmanr(estimated, measured).statistic
        ratio = sum(estimated) / sum(measured)
        sys.stdout.write(f"{name:16} rank correlation {order:.3f}  sums {sum(estimated):.4g} / {sum(measured):.4g}")
        sys.stdout.write(f" = {ratio:.2f}\n")
    both = [pair for pairs in figures.values() for pair in pairs]
    sys.stdout.write(f"{'all together':16} rank correlation {spearmanr(*zip(*both, strict=True)).statistic:.3f}\n")


def _said(rows: Tensor, output: str) -> Tensor:
    return rows.float().log_softmax(-1) if output == "logits" else rows.float()


if __name__ == "__main__":
    app()
