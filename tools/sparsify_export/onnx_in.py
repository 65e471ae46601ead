"""The compiler for ``.onnx`` input: a model that another tool exported in, the same model with sparse ops out."""

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import torch

from .onnx_feeds import feeds_of, looks
from .passes.errors import InputError, VerificationError
from .passes.fitting import thin
from .passes.frontend.load import tokenizer_beside
from .passes.onnx.alone import alone
from .passes.onnx.embeddings import Coded, code_embeddings, replace_embeddings, rounded_tables
from .passes.onnx.fit import Fit, Fitted
from .passes.onnx.left_out import LeftOut
from .passes.onnx.linears import Linear, find_linears
from .passes.onnx.protos import ONNX, data_files, graphs
from .passes.onnx.replace import describe, exchange_weights, replace_linears
from .passes.onnx.sections import Shared, shared_weights
from .passes.onnx.seeds import seed
from .passes.onnx.sparse_linears import Sparse, choose, make_sparse, stored_as
from .passes.onnx.spool import Spool
from .passes.onnx.twin import End, Twin, dense_twin, ends, link_data, mute, read_raw, twins, zeroed
from .passes.onnx.unfold import Unfolded, fold_back
from .passes.onnx.view import Model, read_model
from .passes.onnx.write import write_proto
from .passes.recipe import Timings
from .passes.tables import Embedding
from .report import LinearEntry, Report, as_told, bytes_of
from .runtime.benchmark import Row, compare_files
from .runtime.feeds import Feed
from .runtime.machine import this_machine
from .runtime.prune_onnx import prune_onnx
from .runtime.verify import Verified
from .runtime.verify_onnx import Sides, verify_onnx
from .settings import SILENT, Console, Settings, plain
from .stages import Stages
from .target import Target, inputs_of

SECTIONS = "sections"
"""The folder that the given model is run from while its weights change."""
TWINS = "twins"
"""The folder of what the result is compared with, apart from the result: neither may find the other's weights."""


def compile_onnx(
    source: str,
    out: str,
    settings: Settings,
    *,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    console: Console = SILENT,
) -> Report:
    """Compile the ONNX model ``source`` to ``out``; arguments and results as ``compile_model``.

    Raises:
        InputError: bad input; nothing was written.
        VerificationError: the finished file differs from the dense model with the same weights; it is kept as
            ``OUT.failed``.
    """
    path = Path(source)
    if not path.is_file():
        raise InputError(f"{source} does not exist")
    _check(path, settings, trust_remote_code)
    target = Target.check(out, overwrite=overwrite, inputs=inputs_of(source, settings, None))
    with target.guarded():
        return _compile(path, target, settings, console)


def _compile(path: Path, target: Target, settings: Settings, console: Console) -> Report:
    stages, timings = Stages(), Timings()
    with stages.run("load"):
        console.progress("loading", 0, 0)
        model = read_model(path)
        _check_names(model, target)
        given_bytes = _given_bytes(model)
        linears, left = find_linears(model)
        feeds, checked = feeds_of(model, linears, settings, console)
    chosen = _observed(model, linears, settings)
    target.open()
    lowering = settings.ops == "sparse"
    machine = this_machine() if settings.lower_for is not None else None
    worth = machine.worth(settings.storage, tokens=settings.lower_for or 1) if machine else None
    fitted = None
    if settings.recipe is not None and chosen:
        sections = target.stage / SECTIONS
        sections.mkdir()

        def keeps_dense(weight: Shared, held: torch.dtype, kept: int) -> str:
            assert settings.recipe is not None
            pattern = settings.recipe.pattern
            used = stored_as(weight, held, kept, pattern, settings.storage, sparse_ops=lowering, worth=worth)
            return used if isinstance(used, str) else ""

        fit = Fit(settings.recipe, shared_weights(model, chosen, settings.recipe), console.note, keeps_dense)
        with stages.run("prune"):
            fitted = prune_onnx(model, fit, feeds, sections, progress=console.progress, timings=timings)
        known = [(name, its.directions) for name, its in fitted.items() if isinstance(its, Fitted)]
        seen = [(fit.path(name), count, fit.weights[name].linears[0].weight.shape[1]) for name, count in known]
        if few := thin(seen, path.name):
            console.note(few)
    (target.stage / TWINS).mkdir()
    packed, dense = (Spool(target.stage / name, near=False) for name in ("packed", f"{TWINS}/dense"))
    with stages.run("prune" if settings.recipe and fitted is None else "lower"):
        sparse, dense_still = make_sparse(
            model,
            linears,
            settings.recipe,
            fitted,
            storage=settings.storage,
            sparse_ops=lowering,
            packed=packed,
            dense=dense,
            known=left,
            worth=worth,
            progress=console.progress,
        )
        coded = lowering and settings.storage.quantised
        tables = code_embeddings(model, packed=packed, dense=dense) if coded else []
    if not sparse and not any(table.parts for table in tables):
        there = sum(entry.lowered for entry in map(_entry, left))
        console.note(f"nothing was to do: {there} linears are sparse ops already, no other weight is sparse")
    with stages.run("write"):
        console.progress("writing", 0, 0)
        beside = twins(model, sparse)
        lowered = {entry.linear.nodes[0].outputs[0].name for entry in sparse}
        kept = [entry for entry in model.unfolded if entry.product not in lowered]
        written = _write(model, sparse, tables, kept, target.model, settings)
        packed.file.unlink()
    with stages.run("verify"):
        console.progress("verifying", 0, 0)
        ways = (("kernels", True), ("functions", False)) if lowering else (("standard ops", False),)
        verified = _verify(path, target, written, beside, tables, kept, model.opset, checked, ways)
    with stages.run("measure"):
        console.progress("measuring", 0, 0)
        latency = compare_files(target.model, path, checked[0]) if sparse and lowering else ()
    report = _report(
        str(path),
        settings,
        sparse,
        [*left, *dense_still],
        verified,
        latency,
        stages,
        timings,
        target.model,
        given_bytes,
        machine.key if machine else None,
        tuple(table.entry for table in tables),
    )
    target.finish(None, report)
    return report


def _check(path: Path, settings: Settings, trust_remote_code: bool) -> None:
    """A flag that has no meaning for an ONNX model is refused rather than ignored."""
    recipe, calibration = settings.recipe, settings.calibration
    if recipe is not None and recipe.permute == "fold":
        raise InputError(
            "--permute fold needs the traced model and cannot be had for an .onnx file, which is pruned in the order "
            "of channels that it has; leave it out"
        )
    no_text = calibration.text == "self"
    if not no_text and tokenizer_beside(path.parent) is None:
        raise InputError(
            f"--calibration reads text, for which {path} has no tokenizer beside it; give --calibration-inputs"
        )
    no_inputs = calibration.inputs is None and no_text
    refused = {
        "--eval has no meaning for an .onnx file; evaluate the result with sparsify-export eval": settings.evaluate,
        "--windows has no meaning for an .onnx file, which is not evaluated": settings.windows,
        "--trust-remote-code has no meaning for an .onnx file, which holds no code": trust_remote_code or None,
        "--seq-len has no effect on an .onnx file without --calibration TEXT": calibration.length if no_text else None,
        "--tokens has no effect on an .onnx file without --calibration TEXT": calibration.tokens if no_text else None,
        "--samples has no effect without --calibration-inputs or --calibration TEXT": (
            calibration.samples if no_inputs else None
        ),
        "--score wanda ranks weights by their inputs; give --calibration-inputs or --calibration TEXT": (
            True if no_inputs and recipe is not None and recipe.score == "wanda" else None
        ),
        f"--ria-power {recipe.ria_power if recipe else 0:g} has no effect without --calibration-inputs": (
            True if no_inputs and recipe is not None and recipe.ria_power != type(recipe).ria_power else None
        ),
    }
    for sentence, given in refused.items():
        if given is not None:
            raise InputError(sentence)


def told(settings: Settings) -> dict[str, Any]:
    """The settings that decide something here, as JSON-able values."""
    values = plain(settings)
    if settings.calibration.text == "self":
        values["bos"] = None
    if not looks(settings):
        values |= {"calibration": None, "ria_power": 0.0 if values["score"] == "ria" else None}
    elif values["score"] != "ria":
        values["ria_power"] = None
    return values


def _check_names(model: Model, target: Target) -> None:
    """The result's files must not be those that the given model is still read from."""
    for file in data_files(model.path):
        target.refuse_to_replace(file, f"holds weights of {model.path}")


def _observed(model: Model, linears: Sequence[Linear], settings: Settings) -> list[Linear]:
    """The linears that are pruned on what they read; none where no inputs were given, or nothing asks for them."""
    recipe = settings.recipe
    if recipe is None or not looks(settings):
        return []
    if recipe.score == "magnitude" and recipe.update == "none" and recipe.quantise is None:
        return []
    reasons = choose(model, linears, recipe)
    left = {linear.weight.name for linear in linears if reasons[linear.place]}
    chosen = [linear for linear in linears if linear.weight.name not in left]
    if inside := [linear.path for linear in chosen if linear.place.graph]:
        raise InputError(
            f"{inside[0]} is inside a branch or loop of {model.path}, where its input cannot be observed; "
            f"give --skip {inside[0]!r}, or leave calibration out"
        )
    return chosen


def _write(
    model: Model,
    sparse: list[Sparse],
    tables: list[Coded],
    kept: list[Unfolded],
    out: Path,
    settings: Settings,
) -> onnx.ModelProto:
    if settings.ops == "sparse":
        replace_linears(model, sparse)
    else:
        exchange_weights(model, sparse)
    replace_embeddings(model, tables)
    fold_back(model.proto, kept)
    describe(model, {"onnx_source": str(model.path), "settings": told(settings)})
    write_proto(model.proto, out, base=model.folder, check=model.valid)
    return model.proto


def _verify(
    source: Path,
    target: Target,
    written: onnx.ModelProto,
    beside: Sequence[Twin],
    tables: Sequence[Coded],
    kept: Sequence[Unfolded],
    opset: int,
    checked: Sequence[Feed],
    ways: Sequence[tuple[str, bool]],
) -> list[Verified]:
    """Compare with the user's own file, which gets the same zeros in a folder of its own."""
    folder = target.stage / TWINS
    given = read_raw(source)
    values = zeroed(source, beside, Spool(folder / "zeroed", near=True)) | rounded_tables(source, tables)
    link_data(given, source, folder)
    twin = {exact: folder / f"twin{int(exact)}.onnx" for exact in (False, True)}
    silent = folder / "silent.onnx"
    own = {exact: folder / f"linears{int(exact)}.onnx" for exact in (False, True)}
    result, ours, seeded = target.model, *(target.model.with_name(f".{name}.onnx") for name in ("linears", "seeded"))
    features = [t.sparse.linear.weight.shape[1] for t in beside]
    dtypes = [ONNX[t.sparse.linear.weight.dtype] for t in beside]
    made = [End(t.first.graph, t.sparse.linear.x.name, t.sparse.linear.y.name) for t in beside]
    ours_already = any(node.domain == "sparsify" for graph in graphs(given.graph) for node in graph.node)
    try:
        for exact in (False, True):
            proto = dense_twin(source, beside, values, opset=opset, exact=exact)
            fold_back(proto, kept)
            own[exact].write_bytes(alone(proto, ends(given, beside), features, dtypes).SerializeToString())
            seed(proto)
            twin[exact].write_bytes(proto.SerializeToString())
        mute(proto, ends(given, beside))
        silent.write_bytes(proto.SerializeToString())
        ours.write_bytes(alone(written, made, features, dtypes).SerializeToString())
        if seed(written):
            result = seeded
            result.write_bytes(written.SerializeToString())
        whole = Sides(result, twin[False], twin[True], silent if beside else None)
        each = Sides(ours, own[False], own[True]) if beside else None
        return verify_onnx(target.model.name, whole, each, checked, ways=ways, same_way=ours_already)
    except ValueError as error:  # a linear that does not begin where it was said to
        if isinstance(error, InputError):
            raise
        raise VerificationError(f"{target.model.name} cannot be compared with {source}: {error}") from error
    finally:  # an artifact that is kept because it failed is kept without them
        for file in (ours, seeded):
            file.unlink(missing_ok=True)
        shutil.rmtree(folder)
        shutil.rmtree(target.stage / SECTIONS, ignore_errors=True)  # which was made where weights were fitted


def _report(
    source: str,
    settings: Settings,
    sparse: Sequence[Sparse],
    left: Sequence[LeftOut],
    verified: Sequence[Verified],
    latency: Sequence[Row],
    stages: Stages,
    timings: Timings,
    out: Path,
    given_bytes: int,
    machine: Mapping[str, Any] | None,
    embeddings: tuple[Embedding, ...],
) -> Report:
    pruned = settings.recipe is not None
    linears = [
        LinearEntry(
            path=entry.linear.path,
            shape=entry.linear.weight.shape,
            pattern=entry.pattern,
            op=entry.op,
            reason=entry.note,
            sparsity=entry.sparsity if pruned else None,
            retained_before=entry.retained,
            retained_after=entry.retained,
            dense_bytes=4 * entry.linear.weight.shape[0] * entry.linear.weight.shape[1],
            stored_bytes=entry.stored_bytes,
        )
        for entry in sparse
    ]
    linears = [_with_fit(line, entry.fitted) for line, entry in zip(linears, sparse, strict=True)]
    # Linears that share a weight share its bytes; by its packed parts, which it has one of for each factor.
    shared = {tuple(t.name for t in x.packed) or x.linear.place: e for x, e in zip(sparse, linears, strict=True)}
    once = list(shared.values())
    linears += [_entry(x) for x in left]
    return Report(
        source=source,
        settings=told(settings),
        machine=machine,
        linears=tuple(linears),
        blocks=(),
        verified=as_told(verified),
        evaluation=None,
        latency=tuple(latency),
        stages=tuple(stages.done),
        pruning_seconds=timings.seconds,
        file_bytes=bytes_of(out),
        dense_linear_bytes=sum(entry.dense_bytes for entry in once if entry.lowered),
        stored_linear_bytes=sum(entry.stored_bytes for entry in once if entry.lowered),
        given_bytes=given_bytes,
        embeddings=embeddings,
    )


def _with_fit(entry: LinearEntry, fitted: Fitted | None) -> LinearEntry:
    """With what is known of a weight that was fitted to its inputs."""
    if fitted is None:
        return entry
    names = ["retained_before", "retained_after", "error_before", "error_after", "refused", "directions"]
    names += ["quantiser", "error_quantised"]
    return replace(entry, **{name: getattr(fitted, name) for name in names})


def _entry(x: LeftOut) -> LinearEntry:
    size = 4 * x.shape[0] * x.shape[1]
    return LinearEntry(x.path, x.shape, None, x.op, x.reason, None, None, None, size, x.stored_bytes)


def _given_bytes(model: Model) -> int:
    return sum(file.stat().st_size for file in (model.path, *data_files(model.path)))
