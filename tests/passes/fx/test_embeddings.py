"""Which tables become codes, what they stand for, and why the others stay."""

import numpy as np
import pytest
import torch
from sparsify_export.passes import tables
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.fx.embeddings import quantise_embeddings, stored_tables
from sparsify_export.passes.tables import coded
from torch import Tensor, nn
from toys import export

ROWS, WIDTH = 6000, 64  # 1.13 MB less in 8 bits
IDS = torch.tensor([[0, 5, 5999], [17, 17, 1]])


class Lookups(nn.Module):
    """Two lookups in one table, one in a small one, and a head that may be tied to the first."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.words = nn.Embedding(ROWS, WIDTH)
        self.types = nn.Embedding(2, WIDTH)
        self.head = nn.Linear(WIDTH, ROWS, bias=False)
        if tied:
            self.head.weight = self.words.weight

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        words = self.words(ids)
        return words, self.head(words + self.words(ids.flip(1)) + self.types(ids % 2))


@pytest.fixture(scope="module")
def quantised():
    model = Lookups().eval().requires_grad_(False)
    program = export(model, IDS)
    return model, program, quantise_embeddings(program)


def test_a_large_table_is_codes_and_a_small_one_stays(quantised):
    _, program, found = quantised
    words, types = found
    assert (words.path, words.shape, words.reason) == ("words", (ROWS, WIDTH), "")
    assert (words.dense_bytes, words.stored_bytes) == (ROWS * WIDTH * 4, ROWS * (WIDTH + 4))
    assert (types.path, types.reason) == ("types", "8-bit codes would save 376 bytes")
    assert types.dense_bytes == types.stored_bytes == 2 * WIDTH * 4
    program.validate()
    state = program.state_dict
    assert state.keys() == {
        f"model.{name}" for name in ("words.weight.codes", "words.weight.scales", "types.weight", "head.weight")
    }
    assert state["model.words.weight.codes"].dtype == torch.int8


def test_the_program_computes_with_the_rounded_table(quantised):
    model, program, found = quantised
    tables = stored_tables(program, found)
    assert tables.keys() == {"model.words.weight"}
    rounded = Lookups().eval().requires_grad_(False)
    rounded.words.weight.copy_(tables["model.words.weight"].unpack())
    got = program.module(check_guards=False)(IDS)
    assert all(torch.equal(a, b) for a, b in zip(got, rounded(IDS), strict=True))
    assert not torch.equal(got[0], model(IDS)[0])


def test_codes_are_the_nearest_by_a_loop_over_every_number(monkeypatch):
    monkeypatch.setattr(tables, "PIECE", 3)  # five rows are two pieces
    table = torch.randn(5, 7, generator=torch.Generator().manual_seed(1)) * torch.tensor(
        [[1.0], [1e-3], [50], [0], [2]]
    )
    table[4] = torch.tensor([127, 0.5, 1.5, -0.5, -127, -3, 0])  # steps of 1, with ties, which go to even codes
    made = coded(table)
    for row in range(5):
        scale = np.float32(max(abs(float(x)) for x in table[row])) / np.float32(127)
        assert float(made.scales[row, 0]) == scale
        wanted = [int(np.rint(np.float32(x) / scale)) if scale else 0 for x in table[row].numpy()]
        assert made.codes[row].tolist() == wanted
    assert made.codes[4].tolist() == [127, 0, 2, 0, -127, -3, 0]
    assert not made.unpack()[3].any()


def test_the_error_is_that_of_the_rows(quantised):
    model, program, (words, types) = quantised
    exact = model.words.weight.double()
    wrong = stored_tables(program, [words])["model.words.weight"].unpack().double() - exact
    assert words.error == pytest.approx(float(wrong.square().sum() / exact.square().sum()), rel=1e-6)
    assert 0 < words.error < 1e-4
    assert types.error == 0


def test_a_table_that_the_head_is_tied_to_stays():
    model = Lookups(tied=True).eval().requires_grad_(False)
    program = export(model, IDS)
    words, _ = quantise_embeddings(program)
    assert words.reason == "it is tied to something that is no lookup, such as the head"
    assert all(torch.equal(a, b) for a, b in zip(program.module(check_guards=False)(IDS), model(IDS), strict=True))


def test_a_table_with_nan_is_refused_by_name():
    model = Lookups().eval().requires_grad_(False)
    model.words.weight[7, 3] = torch.nan
    with pytest.raises(InputError, match=r"^words: the weight holds NaN or infinity$"):
        quantise_embeddings(export(model, IDS))
