"""Complex numbers as pairs: the same results, and no complex value left."""

import pytest
import torch
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.fx.complex_pairs import split_complex
from torch import nn


class Rotary(nn.Module):
    """Every op that there is a rule for, as rotary embeddings use them."""

    def forward(self, x, angle, size):
        turned = torch.polar(size, angle).unsqueeze(1) * 1.5
        turned = turned[:, :, None, :].expand(-1, 2, -1, -1).transpose(1, 2).clone() * size[:, None, None]
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
        both = pairs * turned * torch.complex(angle, size)[:, None, None]
        return torch.view_as_real(both.to(torch.complex64)).flatten(3)


class Odd(nn.Module):
    def forward(self, x):
        return torch.view_as_complex(x).abs()


def test_the_same_numbers_without_complex_ones():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, 2, 8, generator=generator)
    given = (x, torch.randn(3, 4, generator=generator), torch.rand(3, 4, generator=generator) + 0.5)
    model = Rotary()
    want = model(*given)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(model, given, dynamic_shapes=({0: batch}, {0: batch}, {0: batch}), strict=False)
    split_complex(program)
    program.graph_module.graph.lint()
    program.graph_module.recompile()
    values = [node.meta.get("val") for node in program.graph_module.graph.nodes]
    assert not any(isinstance(value, torch.Tensor) and value.is_complex() for value in values)
    got = program.module(check_guards=False)(*given)
    assert torch.allclose(got, want, atol=1e-6)
    assert program.graph_module.graph.output_node().args[0][0].meta["val"].shape[1:] == want.shape[1:]


def test_what_has_no_rule_is_refused_by_name():
    program = torch.export.export(Odd(), (torch.randn(3, 2),), strict=False)
    with pytest.raises(InputError, match=r"complex numbers to aten\.abs\.default"):
        split_complex(program)
