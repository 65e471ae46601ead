"""Workloads: how they are written, and what they feed a model."""

import pytest
from sparsify_export.passes.errors import InputError
from sparsify_export.runtime.session import open_session
from sparsify_export.runtime.workload import Workload

IMAGES = "g (float[batch, 3, 4, 4] pixel_values) => (float[batch, 3, 4, 4] y) { y = Relu (pixel_values) }"
TEXT = (
    "g (int64[b, s] input_ids, int64[b, s] attention_mask) => (int64[b, s] y) { y = Add (input_ids, attention_mask) }"
)


@pytest.mark.parametrize(
    "text", ["decode:64", "decode:0", "prefill:128", "prefill:128x8", "decode:64x2", "run", "runx4"]
)
def test_what_is_read_is_written_again(text):
    assert str(Workload.parse(text)) == text


@pytest.mark.parametrize("text", ["", "decode", "prefill:0", "prefill:8x0", "decode:-1", "run:3", "prefill:8x", "walk"])
def test_what_is_none_is_refused(text):
    with pytest.raises(InputError, match=r"is none; want decode:PAST"):
        Workload.parse(text)


def test_a_decoder_gets_ids_a_mask_and_a_cache(tiny):
    session = open_session(tiny.path)
    feed = Workload.parse("decode:6x3").feed(session)
    assert feed["input_ids"].shape == (3, 1)
    assert feed["attention_mask"].shape == (3, 7)
    cache = [x.shape for name, x in feed.items() if name.startswith("past")]
    assert cache
    assert all((shape[0], shape[2]) == (3, 6) for shape in cache)
    session.run(None, feed)
    assert Workload.parse("prefill:5").feed(session)["input_ids"].shape == (1, 5)


def test_an_encoder_and_a_model_of_images(onnx_file):
    text = open_session(onnx_file(TEXT))
    assert {x.shape for x in Workload.parse("prefill:7x2").feed(text).values()} == {(2, 7)}
    for wrong in ("decode:7", "decode:0", "run"):
        with pytest.raises(InputError, match=f"--workload {wrong} "):
            Workload.parse(wrong).feed(text)
    images = open_session(onnx_file(IMAGES))
    assert [x.shape for x in Workload.parse("runx4").feed(images).values()] == [(4, 3, 4, 4)]
    with pytest.raises(InputError, match=r"does not suit a model that takes pixel_values; want run"):
        Workload.parse("prefill:8").feed(images)
