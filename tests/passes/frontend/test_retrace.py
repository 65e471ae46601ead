"""A model traced again in 16 bits: the pruned weights, rounded once, without negative zeros."""

import pytest
import torch
from families import random_model
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.frontend.load import describe
from sparsify_export.passes.frontend.retrace import retrace
from sparsify_export.passes.frontend.trace import trace
from sparsify_export.passes.fx.canonical import canonicalise

DOWN = "model.model.layers.0.mlp.down_proj.weight"


@pytest.fixture(scope="module")
def original():
    traced = trace(describe(random_model("llama")))
    canonicalise(traced.program)
    return {key: value.detach() for key, value in traced.program.state_dict.items()}


@pytest.fixture
def params(original):
    return {key: value.clone() for key, value in original.items()}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_weights_are_the_given_ones_rounded_once(params, dtype):
    params[DOWN][0, :4] = torch.tensor([-0.0, -1e-30, 1.0009765625, 0.0])
    traced = retrace(describe(random_model("llama")), params, dtype)
    state = traced.program.state_dict
    assert set(state) == set(params)
    for key, value in state.items():
        assert value.dtype == dtype, key
        torch.testing.assert_close(value.detach(), params[key].to(dtype), rtol=0, atol=0)
    first = state[DOWN].detach()[0, :4]
    assert not bool(((first == 0) & first.signbit()).any())
    # The frequencies of the rotary embedding would be ruined by 16 bits.
    assert {x.dtype for x in traced.program.constants.values() if x.is_floating_point()} <= {torch.float32}
    past = [n.meta["val"] for n in traced.program.graph.nodes if n.op == "placeholder" and "past" in n.name]
    assert {value.dtype for value in past} == {dtype}


def test_a_weight_that_does_not_fit_is_named(params):
    params[DOWN][3, 4] = 7e4
    with pytest.raises(InputError, match="holds 70000, which float16 cannot hold; give --dtype bf16"):
        retrace(describe(random_model("llama")), params, torch.float16)
