"""The accelerator's cycles: by hand and against loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import accelerator_best
from sparsify_export.simulator import by_projection, simulate


def ones(rows: int, columns: int) -> torch.Tensor:
    return torch.ones(1, 1).expand(rows, columns)


@pytest.mark.parametrize(
    ("shape", "published", "products"),
    [((4096, 4096), 4096, 4096), ((4096, 11008), 10128, 11008), ((11008, 4096), 4096, 11008)],
)
def test_dense_cycles_of_llama_7b(shape, published, products):
    """The paper's dense row holds 4096 and 10128; an 11008 x 4096 matrix really has 11008 x 4096 / 64 / 64."""
    assert simulate("w", ones(*shape), paper_compat=True).dense == published
    many = simulate("w", ones(*shape), tokens=1000)
    assert many.dense == 1000 * products
    assert many.sparse == many.dense


def test_published_split_by_hand():
    """Two of four columns full, the others with one non-zero in 128: 128 x 2 products against 2 are 63 to 1."""
    keep = torch.zeros(128, 4)
    keep[:, :2] = 1
    keep[0, 2:] = 1
    found = simulate("w", keep, paper_compat=True)
    assert (found.dense, found.sparse, found.zeros) == (1, 1, 1 - 258 / 512)
    wide = simulate("w", keep.repeat(8, 256), paper_compat=True)  # 1024 x 1024: 512 columns full, 512 with 8
    # 512 x 1024 / (512 x 1024 + 512 x 8) x 64 = 63.5: 63 and 1; 1024 x 512 / 63 / 64 = 130.03, 4096 / 64 = 64
    assert (wide.dense, wide.sparse) == (256, 131)


def test_memory_decides_with_one_token():
    keep = torch.zeros(64, 4096)
    keep[:, ::2] = 1
    found = simulate("w", keep)
    assert found.dense == 1707  # 64 x 4096 bytes at 153.6 a cycle, and not the 64 cycles of the products
    assert found.sparse == 854  # the full columns go to the dense engine, the empty ones nowhere
    scattered = torch.zeros(64, 4096)
    scattered.view(64, -1, 2)[torch.arange(64) % 2 == 0, :, 0] = 1
    scattered.view(64, -1, 2)[torch.arange(64) % 2 == 1, :, 1] = 1
    assert simulate("w", scattered).sparse == 1067  # half of the bytes and a bitmap: 0.625 of 1706.7


def test_lines_wait_for_the_longest_row():
    even, uneven = torch.zeros(2, 64, 512)
    even[:, :256] = torch.eye(64).repeat(1, 4)
    even[:, 256:] = even[:, :256]
    uneven[0] = 1
    assert even.sum() == uneven.sum()
    tokens = 1000
    assert simulate("w", even, tokens=tokens).sparse == tokens * 1
    assert simulate("w", uneven, tokens=tokens).sparse == tokens * 8
    assert simulate("w", even, paper_compat=True).sparse == 8 * 1
    assert simulate("w", uneven, paper_compat=True).sparse == 8 * 1


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 140),
    columns=st.integers(1, 150),
    density=st.sampled_from([0.0, 0.05, 0.3, 0.5, 0.9, 1.0]),
    uneven=st.booleans(),
    tokens=st.sampled_from([1, 3, 500]),
    seed=st.integers(0, 10**6),
)
def test_agrees_with_loops(rows, columns, density, uneven, tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    chance = torch.full((columns,), density)
    if uneven:
        chance = chance * torch.rand(columns, generator=generator) * 2
    weight = (torch.rand(rows, columns, generator=generator) < chance).float()
    keep = weight.bool().tolist()
    full = [[True] * columns for _ in range(rows)]
    found = simulate("w", weight, tokens=tokens)
    assert found.sparse == max(1, accelerator_best(keep, published=False, tokens=tokens))
    assert found.dense == accelerator_best(full, published=False, tokens=tokens)
    assert found.sparse <= found.dense
    assert found.zeros == pytest.approx(1 - weight.count_nonzero().item() / weight.numel())
    patches = [[row[at : at + rows] for row in keep] for at in range(0, columns, rows)]
    whole = simulate("w", weight, paper_compat=True)
    assert whole.sparse == max(1, sum(accelerator_best(patch, published=True) for patch in patches))


def test_empty_weights_and_several_tokens_of_the_paper_are_refused():
    with pytest.raises(ValueError, match="layer: want a weight"):
        simulate("layer", torch.ones(0, 4))
    with pytest.raises(ValueError, match="one token, not 2"):
        simulate("layer", torch.ones(4, 4), tokens=2, paper_compat=True)


def test_projections_of_all_layers_are_one():
    paths = ["model.layers.0.mlp.up", "model.layers.11.mlp.up", "node_MatMul_7", "/h.3/fc1/MatMul", "lm_head"]
    found = by_projection(simulate(path, torch.ones(2, 2)) for path in paths)
    assert list(found) == ["model.layers.*.mlp.up", "node_MatMul_*", "/h.*/fc1/MatMul", "lm_head"]
