"""Calibration inputs: windows of a text, npz files, and text that the model writes itself."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from families import GROUPED, random_model
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.frontend import batches as module
from sparsify_export.passes.frontend.batches import (
    Batch,
    read_npz,
    read_text,
    read_windows,
    token_batches,
    written_by_itself,
)
from sparsify_export.passes.frontend.load import describe
from sparsify_export.passes.frontend.npz import load_npz
from sparsify_export.passes.frontend.trace import Traced, trace


def letters(text, **options):
    """A tokenizer with one token a character."""
    assert options == {"add_special_tokens": False, "verbose": False}
    return {"input_ids": [ord(c) for c in text]}


def words(text, **options):
    """A tokenizer with one token a word, however long."""
    return {"input_ids": [len(word) for word in text.split()]}


letters.bos_token_id = words.bos_token_id = None


def traced(inputs=("input_ids", "attention_mask"), cache=((2, 4, 8), (2, 4, 8))):
    program = SimpleNamespace(
        graph=SimpleNamespace(nodes=()),
        graph_signature=SimpleNamespace(
            input_specs=[
                SimpleNamespace(kind=SimpleNamespace(name="USER_INPUT"), arg=SimpleNamespace(name=name))
                for name in (*inputs, *range(2 * len(cache)))
            ]
        ),
    )
    return Traced(program, (*inputs, *(f"past_key_values.{i}" for i in range(2 * len(cache)))), (), cache, "causal")


def write(folder, text, name="text.txt"):
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_windows_do_not_overlap_and_the_rest_is_left(tmp_path):
    path = write(tmp_path, "abcdefg")
    assert read_windows(path, letters, samples=None, length=3).tolist() == [[97, 98, 99], [100, 101, 102]]
    assert read_windows(path, letters, samples=1, length=3).tolist() == [[97, 98, 99]]
    assert read_windows(path, letters, samples=9, length=3).shape == (2, 3)


def test_windows_are_shortened_to_the_text(tmp_path):
    assert read_windows(write(tmp_path, "abcde"), letters, samples=4, length=100).tolist() == [[97, 98, 99, 100, 101]]


def test_long_words_are_read_beyond_the_first_guess(tmp_path):
    path = write(tmp_path, " ".join(["x" * 50] * 40))
    assert read_windows(path, words, samples=3, length=10).shape == (3, 10)


def test_jsonl_joins_the_text_fields(tmp_path):
    lines = ['{"text": "ab", "id": 1}', "", '{"text": "c\\nd"}']
    assert read_text(write(tmp_path, "\n".join(lines), "text.jsonl")) == "ab\n\nc\nd"


def test_jsonl_lines_end_at_newlines_only(tmp_path):
    text = "a\u2028b\x85c"  # line separators to Python's splitlines, plain characters to JSON
    line = json.dumps({"text": text}, ensure_ascii=False)
    assert read_text(write(tmp_path, f"{line}\r\n{line}\n", "text.jsonl")) == f"{text}\n\n{text}"


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("text.txt", b"", "is empty; want text"),
        ("text.txt", b" \n ", "is empty; want text"),
        ("text.txt", b"a", "holds 1 tokens; calibration and evaluation need at least 2"),
        ("text.txt", b"\xff\xfe\x00", "cannot read .*utf-8"),
        ("text.jsonl", b"{", "is not JSONL with a text field on every line"),
        ("text.jsonl", b'{"body": "x"}', "is not JSONL with a text field on every line: KeyError"),
        ("text.jsonl", b'{"text": 3}', "is not JSONL with a text field"),
        ("text.jsonl", b"[1]", "is not JSONL with a text field"),
        ("text.jsonl", b'{"text": ""}', "is empty; want text"),
    ],
)
def test_texts_that_are_refused(tmp_path, name, content, why):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(InputError, match=why):
        read_windows(path, letters, samples=1, length=8)
    with pytest.raises(InputError, match=r"cannot read .*nowhere"):
        read_text(tmp_path / "nowhere")


def test_token_batches_fill_in_mask_types_and_an_empty_past():
    windows = torch.arange(15).reshape(5, 3)
    names = ("input_ids", "attention_mask", "token_type_ids")
    found = token_batches(traced(names), windows, names=names, tokens_per_batch=7)
    assert [len(batch.inputs[0]) for batch in found] == [2, 2, 1]
    ids, mask, types, *past = found[1].inputs
    assert torch.equal(ids, windows[2:4])
    assert mask.eq(1).all()
    assert types.eq(0).all()
    assert [x.shape for x in past] == [(2, 2, 0, 4), (2, 2, 0, 8)] * 2
    assert found[1].cached == 4
    assert found[1].token_mask is None
    assert len(token_batches(traced(), windows, names=names[:2], tokens_per_batch=1)) == 5


def test_head_is_the_first_tokens_of_the_first_row():
    (batch,) = token_batches(traced(), torch.arange(200).reshape(2, 100), names=("input_ids", "attention_mask"))
    ids, mask, *past = batch.head().inputs
    assert ids.tolist() == [list(range(64))]
    assert mask.shape == (1, 64)
    assert all(len(x) == 1 for x in past)
    assert batch.head().cached == 4


def test_head_leaves_padding_in_front_out():
    mask = torch.zeros(2, 100, dtype=torch.long)
    mask[0, 90:] = 1
    batch = Batch((torch.arange(200).reshape(2, 100), mask), mask.bool())
    head = batch.head()
    assert head.inputs[0].tolist() == [list(range(90, 100))]
    assert head.token_mask.all()


def test_head_does_not_cut_features():
    for x in (torch.randn(3, 100), torch.randn(3, 2, 100)):
        (head,) = Batch((x,), None).head().inputs
        assert torch.equal(head, x[:1])


def test_npz_files_are_batches_and_padding_is_masked(tmp_path):
    for i in range(3):
        ids, mask = np.full((2, 4), i, dtype=np.int32), np.array([[0, 0, 1, 1], [1, 1, 1, 1]])
        np.savez(tmp_path / f"{i}.npz", input_ids=ids, attention_mask=mask, unused=np.zeros(1))
    found = read_npz(tmp_path, traced(), samples=2)
    assert [int(batch.inputs[0][0, 0]) for batch in found] == [0, 1]
    assert found[0].inputs[0].dtype == torch.int64
    assert found[0].token_mask.tolist() == [[False, False, True, True], [True] * 4]
    assert [x.shape for x in found[0].inputs[2:]] == [(2, 2, 0, 4), (2, 2, 0, 8)] * 2


def test_npz_numbers_become_float32_and_int64(tmp_path):
    kinds = [np.float16, np.float64, np.uint16, np.bool_, np.int8, ">f4"]
    np.savez(tmp_path / "x.npz", **{f"k{i}": np.ones(2, dtype=kind) for i, kind in enumerate(kinds)})
    found = [str(x.dtype) for x in load_npz(tmp_path / "x.npz").values()]
    assert found == [f"torch.{kind}" for kind in ("float32", "float32", "int64", "int64", "int64", "float32")]


def test_npz_folders_that_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"holds no \.npz file"):
        read_npz(tmp_path, traced(), samples=None)
    np.savez(tmp_path / "a.npz", input_ids=np.zeros((1, 2)))
    with pytest.raises(InputError, match=r"a\.npz lacks attention_mask; it holds input_ids"):
        read_npz(tmp_path, traced(), samples=None)
    np.savez(tmp_path / "a.npz")
    with pytest.raises(InputError, match="lacks input_ids, attention_mask; it holds nothing"):
        read_npz(tmp_path, traced(), samples=None)
    for ids, mask in ((np.zeros((1, 2)), np.ones((2, 2))), (np.zeros(()), np.zeros(())), (np.zeros((0, 2)),) * 2):
        np.savez(tmp_path / "a.npz", input_ids=ids, attention_mask=mask)
        with pytest.raises(
            InputError, match=r"want the same number of samples in every array, at least 1; got input_ids"
        ):
            read_npz(tmp_path, traced(), samples=None)


@pytest.mark.parametrize(
    ("ids", "mask", "why"),
    [
        (
            np.ones((2, 4)),
            np.full((2, 4), -10000),
            "attention_mask holds -10000 to -10000; want 1 for tokens and 0 for",
        ),
        (
            np.ones((2, 4)),
            np.full((2, 4), 0.5),
            r"attention_mask holds 0\.5 to 0\.5; want 1 for tokens and 0 for padding",
        ),
        (
            np.ones((2, 4)),
            np.ones((2, 1, 4, 4)),
            r"attention_mask is \[2, 1, 4, 4\]; want \[texts, tokens\]",
        ),
        (np.ones((2, 4, 1)), np.ones((2, 4)), r"input_ids is \[2, 4, 1\]; want \[texts, tokens\]"),
    ],
    ids=["additive", "half", "4-D", "3-D ids"],
)
def test_masks_and_tokens_of_another_kind_are_refused(tmp_path, ids, mask, why):
    np.savez(tmp_path / "a.npz", input_ids=ids, attention_mask=mask)
    with pytest.raises(InputError, match=why):
        read_npz(tmp_path, traced(), samples=None)


def test_tokens_that_the_vocabulary_does_not_have_are_refused(tmp_path):
    real = trace(describe(random_model("bert")))
    one = np.ones((1, 3), np.int64)
    for ids, why in ((one * 96, "from 96 to 96; want whole numbers from 0 to 95"), (one - 2, "from -1 to -1; want")):
        np.savez(tmp_path / "a.npz", input_ids=ids, attention_mask=one, token_type_ids=one)
        with pytest.raises(InputError, match=f"input_ids holds torch.int64 {why}"):
            read_npz(tmp_path, real, samples=None)
    np.savez(tmp_path / "a.npz", input_ids=one, attention_mask=one, token_type_ids=one * 2)
    with pytest.raises(InputError, match=r"token_type_ids holds .* from 2 to 2; want whole numbers from 0 to 1"):
        read_npz(tmp_path, real, samples=None)


def test_npz_files_that_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    np.savez_compressed(path, x=np.arange(1000))
    whole = path.read_bytes()
    np.save(tmp_path / "array.npy", np.arange(3))
    damaged = [b"", b"junk", whole[:100], whole[:-30], whole[:60] + b"\0" * 40 + whole[100:]]
    for content in [*damaged, (tmp_path / "array.npy").read_bytes()]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=r"cannot read .*x\.npz"):
            load_npz(path)


@pytest.mark.parametrize(
    ("array", "why"), [(np.array(["a"]), "holds <U1; want"), (np.ones(1, complex), "holds complex")]
)
def test_npz_of_other_things_than_numbers_is_refused(tmp_path, array, why):
    np.savez(tmp_path / "x.npz", x=array)
    with pytest.raises(InputError, match=why):
        load_npz(tmp_path / "x.npz")


class Touch:
    """Unpickled, this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_npz_is_never_unpickled(tmp_path):
    np.savez(tmp_path / "x.npz", x=np.array([Touch(tmp_path / "ran")], dtype=object))
    with pytest.raises(InputError, match="cannot read"):
        load_npz(tmp_path / "x.npz")
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sparsify-export"


def tiny(seed: int = 0):
    torch.manual_seed(seed)
    return describe(transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**GROUPED, "num_hidden_layers": 1})))


def test_own_text_has_the_asked_size_and_reports_progress(cache):
    seen = []
    text = written_by_itself(tiny(), samples=33, length=4, seed=0, progress=lambda *step: seen.append(step[1:]))
    assert text.shape == (33, 4)
    assert text.dtype == torch.int64
    assert seen[-1] == (33 * 4, 33 * 4)
    assert seen == sorted(seen)


def test_own_text_is_decided_by_the_seed_and_leaves_the_global_generator_alone(cache):
    state = torch.random.get_rng_state()
    first = written_by_itself(tiny(), samples=3, length=8, seed=0)
    torch.random.set_rng_state(state)
    for file in cache.iterdir():
        file.unlink()
    torch.manual_seed(99)
    before = torch.random.get_rng_state()
    pretrained = tiny()
    before = torch.random.get_rng_state()
    assert torch.equal(written_by_itself(pretrained, samples=3, length=8, seed=0), first)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not torch.equal(written_by_itself(pretrained, samples=3, length=8, seed=1), first)


def test_own_text_is_cached_by_weights_and_settings(cache, monkeypatch):
    first = written_by_itself(tiny(), samples=2, length=4, seed=0)
    assert len(list(cache.iterdir())) == 1
    with monkeypatch.context() as patch:
        patch.setattr(module, "_sample", lambda *args: pytest.fail("the model ran again"))
        assert torch.equal(written_by_itself(tiny(), samples=2, length=4, seed=0), first)
    written_by_itself(tiny(seed=1), samples=2, length=4, seed=0)
    written_by_itself(tiny(), samples=3, length=4, seed=0)
    written_by_itself(tiny(), samples=2, length=5, seed=0)
    written_by_itself(tiny(), samples=2, length=4, seed=1)
    assert len(list(cache.iterdir())) == 5


def test_own_text_does_not_need_a_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert written_by_itself(tiny(), samples=1, length=2, seed=0).shape == (1, 2)
    assert [f.name for f in tmp_path.iterdir()] == ["file"]


def test_own_text_of_damaged_weights_is_refused(cache):
    pretrained = tiny()
    pretrained.model.lm_head.weight[3] = float("nan")
    with pytest.raises(InputError, match="logits hold NaN; its weights are damaged"):
        written_by_itself(pretrained, samples=1, length=2, seed=0)
    assert not cache.exists()


def test_own_text_needs_a_model_that_writes(cache):
    with pytest.raises(InputError, match="does not generate text to calibrate on; give --calibration FILE"):
        written_by_itself(describe(random_model("bert")), samples=1, length=2, seed=0)


def test_tokens_are_drawn_by_their_probability():
    assert module._draw(torch.tensor([[0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])).tolist() == [[1], [2]]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        drawn = module._draw(torch.tensor([[0.2, 0.0, 0.5, 0.3]]).expand(20_000, 4)).flatten()
    share = drawn.bincount(minlength=4) / len(drawn)
    # Five standard deviations of a share of 20,000 draws.
    assert torch.allclose(share, torch.tensor([0.2, 0.0, 0.5, 0.3]), rtol=0, atol=5 * 0.5 / 20_000**0.5)


def test_texts_and_what_counts_of_an_output():
    mask = torch.tensor([[True, False, True], [True, True, True]])
    ids = torch.arange(6).view(2, 3)
    batch = Batch((ids, torch.zeros(2, 1)), mask, 1)
    one, other = batch.texts()
    assert torch.equal(one.inputs[0], ids[:1])
    assert torch.equal(other.token_mask, mask[1:])
    assert one.cached == 1
    output = torch.arange(12.0).view(2, 3, 2)
    assert torch.equal(batch.counted(output), output.reshape(6, 2)[mask.reshape(-1)])
    assert len(batch.counted(torch.zeros(2, 5))) == 2  # no row a token: all of it counts
    assert Batch((ids,), None).texts()[1].token_mask is None
