"""Stacks of experts as linears: the same model, per-expert statistics, and back into one op."""

from functools import cache

import pytest
import torch
from expert_models import VOCABULARY, random_experts
from sparsify_export import compile as compiler
from sparsify_export.calibrate.patterns import NM
from sparsify_export.passes.block import Block
from sparsify_export.passes.frontend.batches import Batch, token_batches
from sparsify_export.passes.frontend.kv_cache import empty_past
from sparsify_export.passes.frontend.load import describe
from sparsify_export.passes.frontend.trace import trace
from sparsify_export.passes.fx.canonical import canonicalise, parameter_names
from sparsify_export.passes.fx.experts import BY_TOKEN, TOKENS_OF, find_stacks
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.fx.rewrite import lower_linears, stored_weights
from sparsify_export.passes.fx.run import (
    observe_part,
    run_model,
    run_part,
    run_part_with_grad,
    shared_names,
    start,
    walk,
)
from sparsify_export.passes.observe import observe
from sparsify_export.passes.recipe import Recipe, Timings

RECIPE = Recipe(NM(2, 4), update="alps", mask_from="update", hessian="read")


class Seen:
    """What a model's own experts are given, by its own loop over them."""

    def __init__(self, model):
        self.calls = []
        for module in model.modules():
            if hasattr(module, "down_proj") and getattr(module.down_proj, "ndim", 0) == 3:
                module.register_forward_pre_hook(lambda module, args: self.calls.append((module, *args)))
        model.set_experts_implementation("eager")


@cache
def made(name):
    model = random_experts(name)
    pretrained = describe(model)
    traced = trace(pretrained)
    canonicalise(traced.program)
    parts = partition(traced.program)
    params = {**traced.program.constants, **{k: v.detach() for k, v in traced.program.state_dict.items()}}
    return model, traced, parts, params


def statistics(traced, parts, params, batches, recipe=RECIPE):
    """What is observed of every block, and the notes."""
    notes = []
    found = []
    states = [start(parts, batch.inputs) for batch in batches]
    for part, kept in walk(parts, params, states):
        block = Block(
            part, parts.params, recipe, {x.path: "router" if x.router else "" for x in part.linears}, {},
            tuple(compiler.cache_pairs(traced, parts)), shared_names(parts), kept, 0, notes.append,
            lambda *a: None, Timings(),
        )  # fmt: skip
        found.append((block, observe(block, params, states, batches)))
        for values in states:
            values.update(run_part(part, values, params, parts.params))
    return found, notes


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_statistics_are_those_of_the_tokens_that_the_published_model_routes(name):
    """Against the inputs of the model's own experts; padded tokens must not count."""
    model, traced, parts, params = made(name)
    ids = torch.randint(3, VOCABULARY, (3, 100), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :60] = 0  # in front, as decoders have it
    past = [x for pair in empty_past(traced.cache, 3) for x in pair]
    batches = [Batch((ids, mask, *past), mask.bool(), len(past))]
    found, _ = statistics(traced, parts, params, batches)

    seen = Seen(model)
    with torch.no_grad():
        model(input_ids=ids, attention_mask=mask, position_ids=(mask.cumsum(-1) - 1).clamp(min=0), use_cache=False)
    counts = mask.reshape(-1).bool()
    for (block, observed), (module, hidden, chosen, _) in zip(found, seen.calls, strict=True):
        for linear in block.part.linears:
            stack, _, number = linear.path.rpartition(".")
            if "experts" not in stack:
                continue
            expert = int(number)
            mine = (chosen == expert).any(dim=1) & counts
            x = hidden[mine].double()
            if stack.endswith("down_proj"):
                weight, bias = module.gate_up_proj[expert].double(), 0
                if name == "gpt_oss":
                    bias = module.gate_up_proj_bias[expert].double()
                    x = module._apply_gate(x @ weight + bias)
                else:
                    gate, up = (x @ weight.T).chunk(2, dim=-1)
                    x = module.act_fn(gate) * up
            if len(x) < x.shape[1]:
                continue  # takes what all experts saw: the next test
            want = 2 / len(x) * x.T @ x
            assert torch.allclose(observed.hessians[linear.input].double(), want, rtol=1e-3, atol=1e-5 * want.max())
            assert torch.allclose(observed.norms[linear.input].double(), x.norm(dim=0), rtol=1e-4)


def test_an_expert_with_few_tokens_takes_those_of_all_and_that_is_told():
    _, traced, parts, params = made("mixtral")
    ids = torch.randint(3, VOCABULARY, (1, 60), generator=torch.Generator().manual_seed(1))
    found, notes = statistics(traced, parts, params, token_batches(traced, ids, names=("input_ids", "attention_mask")))
    block, observed = found[0]
    inputs = {x.path.rpartition(".")[2]: x.input for x in block.part.linears if "gate_up" in x.path}
    hessians = [observed.hessians[node] for node in inputs.values()]
    assert len(inputs) == 4
    assert all(torch.equal(hessian, hessians[0]) for hessian in hessians)
    assert float(observed.norms[inputs["0"]].square().sum()) > 0
    first = notes[0]
    assert "4 of the 4 experts of model.layers.0.mlp.experts.gate_up_proj were given fewer tokens" in first
    assert "(64)" in first
    assert "fitted to the 120 tokens of all experts" in first


def test_experts_see_different_tokens():
    """The fault put back, statistics of all tokens for every expert, would show in the test above and here."""
    _, traced, parts, params = made("mixtral")
    ids = torch.randint(3, VOCABULARY, (4, 100), generator=torch.Generator().manual_seed(1))
    found, notes = statistics(traced, parts, params, token_batches(traced, ids, names=("input_ids", "attention_mask")))
    block, observed = found[0]
    hessians = [observed.hessians[x.input] for x in block.part.linears if "gate_up" in x.path]
    assert not any(torch.equal(a, b) for i, a in enumerate(hessians) for b in hessians[:i])
    assert not any("gate_up" in note for note in notes)


@pytest.mark.parametrize("name", ["gpt_oss", "phimoe", "llama4"])
def test_the_linears_are_named_and_the_router_is_known(name):
    _, traced, parts, _ = made(name)
    experts = 4
    for part in parts.blocks:
        paths = [linear.path for linear in part.linears]
        assert sum(".gate_up_proj." in path for path in paths) == experts
        assert sum(".down_proj." in path for path in paths) == experts
        (router,) = [linear for linear in part.linears if linear.router]
        assert router.out_features == experts
    graph = traced.program.graph_module.graph
    assert len(find_stacks(graph)) == 4
    assert not any(node.target is torch.ops.sparsify.stacked_linear.default for node in graph.nodes)


def test_gate_and_up_are_two_linears_for_scores_that_look_at_rows():
    _, _, parts, _ = made("mixtral")
    found = [linear for linear in parts.blocks[0].linears if ".gate_up_proj." in linear.path]
    assert {linear.parts.sizes for linear in found} == {(96, 96)}


def test_a_gradient_reaches_the_experts_that_were_chosen():
    _, traced, parts, params = made("mixtral")
    ids = torch.randint(3, VOCABULARY, (1, 3), generator=torch.Generator().manual_seed(1))
    (batch,) = token_batches(traced, ids, names=("input_ids", "attention_mask"))
    keys = [x.weight for x in parts.blocks[0].linears if ".down_proj." in x.path]
    leaves = {key: params[key].clone().requires_grad_(True) for key in keys}

    def run(*arguments):
        with torch.enable_grad():
            return run_part_with_grad(*arguments)

    run_model(parts, batch.inputs, {**params, **leaves}, run).square().sum().backward()
    asked = set(_ids_of(parts, params, batch).tolist())
    for expert, leaf in enumerate(leaves.values()):
        reached = leaf.grad is not None and bool(leaf.grad.any())
        assert reached == (expert in asked)


def _ids_of(parts, params, batch):
    """Which experts the first block's tokens ask for."""
    part = parts.blocks[0]
    node = next(n for n in part.module.graph.nodes if n.target is TOKENS_OF)
    seen = []
    values = start(parts, batch.inputs)
    for before in parts.parts[: parts.parts.index(part)]:
        values.update(run_part(before, values, params, parts.params))
    observe_part(part, values, params, parts.params, {}, {node.name: lambda args, kwargs: seen.append(args[1])})
    return seen[0]


def test_lowered_stacks_hold_every_expert_and_compute_the_same():
    _, traced, parts, params = made.__wrapped__("mixtral")  # which is changed
    state = traced.program.state_dict
    for linear in [x for part in parts.blocks for x in part.linears if not x.router]:
        weight = state[linear.weight].detach().clone()
        weight[:, ::2] = 0.0
        state[linear.weight] = torch.nn.Parameter(weight, requires_grad=False)
        params[linear.weight] = weight
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    (batch,) = token_batches(traced, ids, names=("input_ids", "attention_mask"))
    want = run_model(parts, batch.inputs, params, run_part)
    lowered = lower_linears(traced.program)
    assert {entry.op for entry in lowered if ".experts." in entry.linear.path} == {"experts_linear_nm"}
    packed = stored_weights(traced.program, lowered)
    for key, value in packed.items():
        assert torch.equal(value.unpack(), params[key])
    targets = {node.target for node in traced.program.graph_module.graph.nodes}
    assert not {BY_TOKEN, TOKENS_OF} & targets
    held = [spec.target for spec in traced.program.graph_signature.input_specs if spec.target]
    assert set(held) >= set(parameter_names(traced.program).values())
    module = traced.program.module(check_guards=False)
    past = empty_past(traced.cache, 2)
    got = module(*batch.inputs[:2], past)[0]
    assert torch.allclose(got, want, atol=1e-5)


def test_one_dense_expert_keeps_its_stack_dense_and_that_is_told():
    _, traced, parts, _ = made.__wrapped__("mixtral")
    state = traced.program.state_dict
    for linear in [x for part in parts.blocks for x in part.linears if ".experts." in x.path]:
        if not linear.path.endswith("layers.0.mlp.experts.down_proj.2"):
            weight = state[linear.weight].detach().clone()
            weight[:, ::2] = 0.0
            state[linear.weight] = torch.nn.Parameter(weight, requires_grad=False)
    lowered = {entry.linear.path: entry for entry in lower_linears(traced.program)}
    first = lowered["model.layers.0.mlp.experts.down_proj.0"]
    assert first.op == "MatMul"
    assert first.reason == "it is stored with model.layers.0.mlp.experts.down_proj.2, which stays dense"
    assert lowered["model.layers.0.mlp.experts.down_proj.2"].reason == "the weight is dense"
    assert lowered["model.layers.0.mlp.experts.gate_up_proj.0"].op == "experts_linear_nm"
