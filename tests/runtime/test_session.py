"""Opening files, decoding with the cache, and the proof of which kernels ran."""

import copy

import numpy as np
import pytest
import torch
from onnx_models import genai
from sparsify_export import runtime
from sparsify_export.passes.equivalence import compare
from sparsify_export.passes.errors import InputError
from sparsify_export.runtime.session import CausalSession, open_session, sparse_runs

IDS = np.random.default_rng(5).integers(23, size=(2, 7))


def logits(path, **options):
    causal = CausalSession(open_session(path, threads=1, **options))
    return causal.step(IDS, np.ones_like(IDS), causal.empty_past(2))[0]


def assert_same(got, model):
    """Against float64, with torch in float32 as the budget; another order of the sums is worth a factor."""
    ids = torch.from_numpy(IDS)
    with torch.no_grad():
        closeness = compare(
            torch.from_numpy(got), model(ids).logits, copy.deepcopy(model).double()(ids).logits, factor=4.0
        )
    assert closeness.ok, str(closeness)


@pytest.mark.parametrize("kernels", [True, False])
def test_the_file_computes_what_the_model_computes(tiny, kernels):
    assert_same(logits(tiny.path, kernels=kernels), tiny.model)


def test_the_profile_proves_which_kernels_ran(tiny, tmp_path):
    for kernels, expected in [(True, {"linear_nm": 3, "linear_bitmask": 3}), (False, {})]:
        session = open_session(tiny.path, kernels=kernels, profile=tmp_path / "profile")
        causal = CausalSession(session)
        for _ in range(3):
            causal.step(IDS, np.ones_like(IDS), causal.empty_past(2))
        assert sparse_runs(session) == expected
    assert not list(tmp_path.iterdir())  # profiles are deleted


def test_no_profile_no_proof(tiny):
    with pytest.raises(ValueError, match="records no profile"):
        sparse_runs(open_session(tiny.path))


@pytest.mark.parametrize("cut", [1, 3, 6])
def test_a_text_in_two_pieces_gives_the_same_logits(tiny, cut):
    causal = CausalSession(open_session(tiny.path, threads=1))
    first, past = causal.step(IDS[:, :cut], np.ones((2, cut), np.int64), causal.empty_past(2))
    second, past = causal.step(IDS[:, cut:], np.ones_like(IDS), past)
    assert [p.shape() for p in past] == [[2, 1, 7, 8]] * 2
    assert_same(np.concatenate([first, second], axis=1), tiny.model)


def test_a_folder_means_the_model_inside(tiny):
    assert_same(logits(tiny.path.parent), tiny.model)


def test_vocabulary_and_random_past(tiny):
    causal = CausalSession(open_session(tiny.path))
    assert causal.vocabulary == 23
    assert [p.shape() for p in causal.random_past(3, 5)] == [[3, 1, 5, 8]] * 2


def test_refuses_what_is_not_there(tiny, tmp_path):
    with pytest.raises(InputError, match=r"nowhere\.onnx does not exist"):
        open_session(tmp_path / "nowhere.onnx")
    with pytest.raises(InputError, match=r"model\.onnx does not exist"):
        open_session(tmp_path)
    with pytest.raises(InputError, match=r"does not end in \.onnx"):
        open_session(tiny.path.with_name("model.onnx.data"))


@pytest.mark.parametrize("content", [b"", b"hello", b"\x08\x0a"])
def test_refuses_what_is_not_onnx(tmp_path, content):
    (tmp_path / "model.onnx").write_bytes(content)
    says = "Protobuf parsing failed|No graph was found|.*ModelProto does not have a graph"
    with pytest.raises(InputError, match=rf"^cannot open .*model\.onnx: ({says})[^\n]*$"):
        open_session(tmp_path)


def test_refuses_a_file_without_its_data(tiny, tmp_path):
    (tmp_path / "model.onnx").write_bytes(tiny.path.read_bytes())
    with pytest.raises(InputError, match=r"cannot open .*model\.onnx"):
        open_session(tmp_path / "model.onnx")


def test_refuses_to_decode_what_has_no_cache(onnx_file):
    path = onnx_file("g (int64[b, s] input_ids) => (float[b, s] y) { y = Cast <to = 1> (input_ids) }")
    with pytest.raises(InputError, match=r"not a causal language model: .* takes input_ids and 0 cache tensors"):
        CausalSession(open_session(path))


def test_library_path(monkeypatch, tmp_path):
    assert runtime.library_path().is_file()
    monkeypatch.setattr(runtime._native, "__file__", str(tmp_path / "_native.so"))
    with pytest.raises(FileNotFoundError, match=r"libsparsify_ort\.so is missing; reinstall"):
        runtime.library_path()


def test_a_cache_of_unknown_head_size_is_refused(tmp_path):
    session = open_session(genai(tmp_path))
    with pytest.raises(InputError, match=r"past_key_values\.0\.key is .*'kv_cache_dim'.*; want numbers"):
        CausalSession(session)
