"""Pruning an ONNX file on what its linears read, against the published model in torch and against slow references."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import reference
import torch
from exported import attended, encoder, export, feeds, inputs, linears, path_of
from onnx_models import FORMS, build, dense, genai, mlp, node, quantised, rng, saved
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.calibrate.update import relative_error
from sparsify_export.passes.dialect.storage import Storage
from sparsify_export.passes.equivalence import compare_model
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.onnx.fit import Fit
from sparsify_export.passes.onnx.flow import flow_of, stretch
from sparsify_export.passes.onnx.linears import find_linears
from sparsify_export.passes.onnx.sections import sections, shared_weights
from sparsify_export.passes.onnx.view import read_model
from sparsify_export.passes.recipe import Quantise, Recipe
from sparsify_export.runtime import prune_onnx as subject
from sparsify_export.runtime.prune_onnx import prune_onnx

TWO_OF_FOUR = NM(2, 4)
ALPS = {"update": "alps", "mask_from": "update", "permute": "none"}


def pruned(path, batches, folder, *, pattern=TWO_OF_FOUR, **recipe):
    """The weights by the name of their linear, and every statistic that was used: Hessians by name of the linear."""
    model = read_model(path)
    found, _ = find_linears(model)
    how = Recipe(pattern, **recipe)
    fit = Fit(how, shared_weights(model, found, how), lambda text: None, lambda weight, dtype, kept: "")
    seen = {}
    real = subject.fit_section

    def spied(fit, section, statistics, keep_new):
        for weight in section.weights:
            seen[path_of(weight.path)] = [statistics[reading] for reading in weight.fitted_to]
        return real(fit, section, statistics, keep_new)

    folder.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subject, "fit_section", spied)
        done = prune_onnx(model, fit, batches, folder)
    return {path_of(fit.path(key)): its for key, its in done.items()}, seen


def moment(rows):
    return 2 / len(rows) * rows.mT @ rows


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    return encoder(), export(encoder(), folder / "encoder.onnx")


@pytest.mark.parametrize(("pattern", "shared"), [(TWO_OF_FOUR, 1), (Unstructured(0.5), 2)], ids=str)
def test_every_linear_is_fitted_to_what_the_published_model_reads_with_all_before_it_pruned(tmp_path, pattern, shared):
    path = export(encoder(shared), tmp_path / "encoder.onnx")
    batches = feeds()
    done, seen = pruned(path, batches, tmp_path / "s", pattern=pattern, **ALPS)
    models = {dtype: encoder(shared).to(dtype) for dtype in (torch.float32, torch.float64)}
    names = list(linears(models[torch.float32]))
    assert list(seen) == names  # in the order in which they run
    first = inputs(models[torch.float64], batches)
    for name in names:
        (statistic,) = seen[name]
        read = attended if name.endswith(".v") else lambda model, name, batches: inputs(model, batches)[name]
        baseline, exact = (moment(read(model, name, batches)) for model in models.values())
        close = compare_model(statistic.matrix(), baseline.float(), exact)
        assert close.ok, (name, close)
        if name.startswith("layers.1"):  # statistics of the dense path are others: the fault would be seen
            assert not compare_model(moment(first[name]).float(), baseline.float(), exact).ok
        for model in models.values():
            with torch.no_grad():
                model.get_submodule(name).weight.copy_(done[name].read())


@pytest.mark.parametrize(("pattern", "update"), [(TWO_OF_FOUR, "alps"), (Unstructured(0.5), "cg")], ids=str)
def test_what_is_left_is_the_best_that_the_mask_allows(published, tmp_path, pattern, update):
    model, path = published
    chooses = {"mask_from": "update" if update == "alps" else "score", "permute": "none"}
    done, seen = pruned(path, feeds(), tmp_path / "s", pattern=pattern, update=update, **chooses)
    for name, module in linears(model).items():
        weight, hessian, new = module.weight, seen[name][0].matrix(), done[name].read()
        best = reference.best_weight(weight, hessian, new != 0)
        least, masked = (relative_error(w.float(), weight, hessian) for w in (best, torch.where(new != 0, weight, 0.0)))
        found = relative_error(new, weight, hessian)
        assert least * (1 - 1e-3) <= found <= least + 0.05 * (masked - least)  # what ten steps leave
        assert done[name].error_after == pytest.approx(found, rel=1e-3)
        assert done[name].error_after < done[name].error_before
        kept = int((new != 0).sum())
        assert kept == new.numel() // 2
        if pattern == TWO_OF_FOUR:
            assert (new != 0).reshape(len(new), -1, 4).sum(-1).eq(2).all()
        assert not bool(torch.signbit(new[new == 0]).any())


def test_masks_alone_go_by_what_the_pruned_model_reads(published, tmp_path):
    _, path = published
    batches = feeds()
    done, _ = pruned(path, batches, tmp_path / "s", score="wanda", permute="none")
    own = encoder()
    for name, module in linears(own).items():
        norm = inputs(own, batches)[name].norm(dim=0)
        keep = reference.nm_keep_mask(reference.wanda(module.weight, norm), 2, 4)
        assert torch.equal(done[name].read(), torch.where(keep, module.weight, 0.0))
        module.weight.data.copy_(done[name].read())
    assert {its.error_after for its in done.values()} == {None}


def run(path, feed):
    return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, feed)


@pytest.mark.parametrize("kind", ["encoder", "genai", "branches"])
def test_stretches_of_a_model_one_after_the_other_are_the_model(published, tmp_path, kind):
    if kind == "encoder":
        path, feed = published[1], feeds(1)[0]
    elif kind == "genai":
        path = genai(tmp_path)
        past = np.zeros((1, 2, 0, 16), np.float32)
        feed = {"input_ids": np.arange(5)[None], "attention_mask": np.ones((1, 5), np.int64)}
        feed |= {f"past_key_values.0.{name}": past for name in ("key", "value")}
    else:
        path, feed = saved(branching(), tmp_path), {"x": rng().standard_normal((3, 8)).astype(np.float32)}
    model = read_model(path)
    flow = flow_of(model, [linear for linear in find_linears(model)[0] if not linear.place.graph])
    outputs = [value.name for value in model.proto.graph.output]
    state = dict(feed)
    for begin in range(len(flow.steps)):
        live = flow.live(begin + 1, outputs)
        made = sorted(name for name in live if flow.made.get(name) == begin)
        proto = stretch(flow, begin, begin + 1, made, state, {})
        if made:
            (tmp_path / "part.onnx").write_bytes(proto.SerializeToString())
            got = run(tmp_path / "part.onnx", {value.name: state[value.name] for value in proto.graph.input})
            state |= dict(zip(made, got, strict=True))
        state = {name: value for name, value in state.items() if name in live}
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    whole = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"]).run(outputs, feed)
    for name, wanted in zip(outputs, whole, strict=True):
        exact = torch.from_numpy(wanted)
        assert compare_model(torch.from_numpy(state[name]), exact, exact.double()).ok


def branching():
    """An If whose branches read tensors around it, and weights that nodes transpose and make."""
    then, other = (
        onnx.helper.make_graph(
            [node(op, ["h", "around"], ["out"])], op, [], [onnx.helper.make_tensor_value_info("out", 1, None)]
        )
        for op in ("Add", "Sub")
    )
    nodes = [
        node("Constant", [], ["half"], value=onnx.numpy_helper.from_array(np.float32(0.5))),
        node("Mul", ["w", "half"], ["scaled"]),
        node("Transpose", ["v"], ["turned"], perm=[1, 0]),
        node("MatMul", ["x", "scaled"], ["around"], name="computed"),
        node("MatMul", ["x", "turned"], ["h"], name="turning"),
        node("ReduceSum", ["x"], ["sum"], keepdims=0),
        node("Greater", ["sum", "half"], ["more"]),
        node("If", ["more"], ["y"], then_branch=then, else_branch=other),
    ]
    return build(nodes, {"x": ["t", 8]}, ["y"], {"w": dense(8, 8, 1), "v": dense(8, 8, 2)})


def test_other_graphs_gemm_with_a_transposed_weight_batches_in_front_and_a_weight_read_twice(tmp_path):
    """No text: pictures in patches. The weight that two linears share is fitted to what both read."""
    weights = {"w0": dense(8, 16, 1), "w1": dense(12, 16, 2), "w2": dense(12, 12, 3), "b": dense(1, 12, 4)[0]}
    nodes = [
        node("MatMul", ["x", "w0"], ["a"], name="patches"),  # [batch, 4, 5, 8]
        node("Relu", ["a"], ["r"]),
        node("Reshape", ["r", "flat"], ["f"]),
        node("Gemm", ["f", "w1", "b"], ["g"], name="gemm", transB=1),
        node("Tanh", ["g"], ["t"]),
        node("MatMul", ["t", "w2"], ["u"], name="once"),
        node("Relu", ["u"], ["s"]),
        node("MatMul", ["s", "w2"], ["z"], name="twice"),
        node("Relu", ["z"], ["y"]),
    ]
    path = saved(build(nodes, {"x": ["n", 4, 5, 8]}, ["y"], {**weights, "flat": np.array([-1, 16])}), tmp_path)
    batches = [{"x": rng(i).standard_normal((3, 4, 5, 8)).astype(np.float32)} for i in range(2)]
    done, seen = pruned(path, batches, tmp_path / "s", pattern=TWO_OF_FOUR, **ALPS)
    assert set(done) == {"patches", "gemm", "once"}
    x = np.concatenate([feed["x"] for feed in batches]).reshape(-1, 8).astype(np.float64)
    new = {name: its.read().double().numpy() for name, its in done.items()}
    r = np.maximum(x @ new["patches"].T, 0)
    t = np.tanh(r @ new["gemm"].T + weights["b"])
    s = np.maximum(t @ weights["w2"], 0)  # the second reader is seen before the weight is pruned
    assert done["gemm"].read().shape == (12, 16)
    for name, read in {"patches": [x], "gemm": [r], "once": [t, s]}.items():
        for statistic, rows in zip(seen[name], read, strict=True):
            exact = torch.from_numpy(rows)
            baseline = moment(exact.float())
            assert compare_model(statistic.matrix(), baseline, moment(exact)).ok
    both = sum(statistic.matrix() for statistic in seen["once"])
    original = torch.from_numpy(weights["w2"].T)
    assert done["once"].error_after == pytest.approx(relative_error(done["once"].read(), original, both), rel=1e-3)


def test_sections_wait_for_what_they_are_fitted_to(published):
    model = read_model(published[1])
    recipe = Recipe(TWO_OF_FOUR, **ALPS)
    weights = shared_weights(model, find_linears(model)[0], recipe)
    flow = flow_of(model, find_linears(model)[0])
    found = sections(flow, weights.values())
    names = [[path_of(weight.path) for weight in section.weights] for section in found]
    layer = [["q", "k"], ["v"], ["o"], ["up"], ["down"]]
    assert names == [[f"layers.{i}.{name}" for name in part] for i in (0, 1) for part in layer]
    assert [section.known > section.begin for section in found] == [False, True, False, False, False] * 2
    plain = shared_weights(model, find_linears(model)[0], Recipe(TWO_OF_FOUR, hessian="inputs", **ALPS))
    assert all(not reading.attention for weight in plain.values() for reading in weight.fitted_to)


def test_a_sweep_to_a_grid_goes_by_the_same_hessian(published, tmp_path):
    model, path = published
    storage = Storage("int4", 32)
    done, seen = pruned(path, feeds(), tmp_path / "s", quantise=Quantise(storage, "sweep"), **ALPS)
    for name, module in linears(model).items():
        its, hessian = done[name], seen[name][0].matrix()
        assert its.quantiser == "sweep"
        assert its.error_quantised == pytest.approx(relative_error(its.read(), module.weight, hessian), rel=1e-3)
        scales = its.on_grid.scales.repeat_interleave(32, dim=1)[:, : module.in_features]
        codes = its.read() / torch.where(scales > 0, scales, 1.0)
        assert torch.allclose(codes, codes.round(), atol=1e-4)


def test_weights_that_stay_dense_are_dense_for_those_behind_them(tmp_path):
    path = saved(mlp(dense(8, 16, 1), dense(16, 8, 2), dense(8, 8, 3)), tmp_path)
    batches = [{"x": rng().standard_normal((20, 8)).astype(np.float32)}]
    model = read_model(path)
    found, recipe = find_linears(model)[0], Recipe(TWO_OF_FOUR, **ALPS)
    why = {"fc1": "it is slower"}
    fit = Fit(recipe, shared_weights(model, found, recipe), print, lambda weight, *rest: why.get(weight.path, ""))
    (tmp_path / "s").mkdir()
    done = prune_onnx(model, fit, batches, tmp_path / "s")
    assert done["w1"] == "it is slower"
    assert done["w0"].error_after < done["w0"].error_before


def test_what_cannot_be_calibrated_on_is_said(tmp_path):
    nodes = [node("MatMul", ["x", "w"], ["y"], name="fc"), node("Cast", ["attention_mask"], ["z"], to=1)]
    proto = build(nodes, {"x": ["b", "s", 4], "attention_mask": ["b", "s"]}, ["y", "z"], {"w": dense(4, 4)})
    proto.graph.input[1].type.tensor_type.elem_type = 7
    path = saved(proto, tmp_path)
    x = np.ones((2, 3, 4), np.float32)
    x[0, 2] = np.inf
    mask = np.array([[1, 1, 0], [1, 0, 0]])
    _, seen = pruned(path, [{"x": x, "attention_mask": mask}], tmp_path / "s", **ALPS)
    assert torch.equal(seen["fc"][0].matrix(), torch.full((4, 4), 2.0))
    with pytest.raises(InputError, match="fc: activations hold NaN"):
        pruned(path, [{"x": x, "attention_mask": mask * 0 + 1}], tmp_path / "t", **ALPS)
    with pytest.raises(InputError, match="fc: no calibration token reached this layer"):
        pruned(path, [{"x": x, "attention_mask": mask * 0}], tmp_path / "u", **ALPS)


@pytest.mark.parametrize("form", [*FORMS, "Cast and Mul"])
def test_quantised_weights_are_pruned_as_floats_and_seen_so_further_on(tmp_path, form):
    """Behind the first linear, what the second reads: of floats, as the sparse op computes it."""
    nodes, weights = quantised(form)
    weights["w"] = rng(1).integers(1, 100, weights["w"].shape).astype(weights["w"].dtype)
    again = [onnx.NodeProto.FromString(each.SerializeToString()) for each in nodes]
    for each in again:
        each.name = "again" if each.name else ""
        each.input[:] = ["r" if name == "x" else name and f"{name}.2" for name in each.input]
        each.output[:] = [f"{name}.2" for name in each.output]
    between = [node("Concat", ["y", "y"], ["twice"], axis=1), node("Relu", ["twice"], ["r"])]
    every = weights | {f"{name}.2": value for name, value in weights.items()}
    last = [node("Relu", ["y.2"], ["z"])]
    path = saved(build([*nodes, *between, *again, *last], {"x": ["t", 64]}, ["z"], every), tmp_path)
    x = rng(2).standard_normal((100, 64)).astype(np.float32)
    done, seen = pruned(path, [{"x": x}], tmp_path / "s", **ALPS)
    assert set(done) == {"fc", "again"}
    new, bias = done["fc"].read(), torch.from_numpy(weights["b"])
    assert (new != 0).reshape(len(new), -1, 4).sum(-1).eq(2).all()
    states = []
    for dtype in (torch.float32, torch.float64):
        y = torch.from_numpy(x).to(dtype) @ new.to(dtype).mT + bias
        states.append(moment(torch.cat([y, y], dim=1).relu()))
    (statistic,) = seen["again"]
    assert compare_model(statistic.matrix(), *states).ok
    assert all(its.error_after < its.error_before for its in done.values())
