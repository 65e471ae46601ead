"""Measure one cell: prune the traced model as the compiler does, and evaluate the pruned graph in torch."""

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from sparsify_export.calibration_data import text_batches
from sparsify_export.compile import as_stored, cache_pairs, store
from sparsify_export.objective import output_of
from sparsify_export.passes.dialect.storage import FP32
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.frontend.batches import read_windows, token_batches
from sparsify_export.passes.frontend.load import Pretrained, load
from sparsify_export.passes.frontend.trace import Traced, trace
from sparsify_export.passes.fx.canonical import canonicalise
from sparsify_export.passes.fx.embeddings import quantise_embeddings, stored_tables
from sparsify_export.passes.fx.partition import Partition, partition
from sparsify_export.passes.fx.rewrite import lower_linears, stored_weights
from sparsify_export.passes.fx.run import run_model, run_part_rounded
from sparsify_export.passes.recipe import BlockReport
from sparsify_export.passes.sparsify import sparsify
from sparsify_export.runtime.evaluate import Logits, perplexity
from sparsify_export.runtime.exact import exact_answers
from sparsify_export.stages import Stages

from .cells import DENSE, Cell, recipe_of, split_pattern
from .learned import learned


def measure(cell: Cell) -> dict[str, Any]:
    """Prune as the cell says, and evaluate.

    Raises:
        InputError: the model is no causal language model with a tokenizer, or what the pipeline raises.
    """
    stages = Stages()
    with stages.run("load"):
        pretrained = load(cell.model)
        if pretrained.kind != "causal" or pretrained.tokenizer is None:
            raise InputError(f"{cell.model} is not a causal language model with a tokenizer")
        calibration = read_windows(
            Path(cell.calibration), pretrained.tokenizer, samples=cell.samples, length=cell.seq_len
        )
        evaluation = read_windows(Path(cell.text), pretrained.tokenizer, samples=cell.windows, length=cell.window)
        traced = trace(pretrained)
        canonicalise(traced.program)
        parts = partition(traced.program)
    params = {**traced.program.constants, **{k: v.detach() for k, v in traced.program.state_dict.items()}}
    blocks: tuple[BlockReport, ...] = ()
    rounded: dict[str, Any] = {}
    if cell.method != DENSE:
        recipe, storage = recipe_of(cell), split_pattern(cell.pattern)[1]
        batches = text_batches(traced, pretrained, recipe, calibration)
        with stages.run("prune"):
            done = sparsify(
                parts, params, recipe, batches, output=output_of(traced, pretrained), cache=cache_pairs(traced, parts)
            )
        blocks = done.blocks
        if storage != FP32:
            store(traced, params)
            lowered = lower_linears(traced.program, storage=storage, on_grid=done.on_grid, patterns=done.patterns)
            packed = stored_weights(traced.program, lowered)
            tables = quantise_embeddings(traced.program) if storage.quantised else []
            params = as_stored(params, {**packed, **stored_tables(traced.program, tables)})
            rounded = dict.fromkeys(packed, storage.activations)
    logits = graph_logits(pretrained, traced, parts, params, rounded)
    found = perplexity(logits, evaluation)
    answers = exact_answers(logits, pretrained.tokenizer)
    linears = [linear for block in blocks for linear in block.linears]
    size = sum(math.prod(linear.shape) for linear in linears)
    last = stages.done[-1]
    return {
        "perplexity": found.perplexity,
        "mean_nll": found.mean_nll,
        "windows": found.windows,
        "exact": dict(answers.scores),
        "error": sum(block.error for block in blocks) / len(blocks) if blocks else 0.0,
        "zeros": sum(x.sparsity * math.prod(x.shape) for x in linears) / size if size else 0.0,
        "learned": learned(recipe_of(cell), linears) if blocks else 0,
        "seconds": last.seconds if blocks else 0.0,
        "peak_bytes": last.peak_bytes,
    }


def graph_logits(
    pretrained: Pretrained,
    traced: Traced,
    parts: Partition,
    params: Mapping[str, torch.Tensor],
    rounded: Mapping[str, Any],
) -> Logits:
    """The traced graph with other weights as a function from ids to logits; ``rounded`` as in ``expect``."""

    def logits(ids: torch.Tensor) -> torch.Tensor:
        (batch,) = token_batches(traced, ids, names=pretrained.inputs, tokens_per_batch=ids.numel())
        return run_model(parts, batch.inputs, params, partial(run_part_rounded, rounded=rounded))

    return logits
