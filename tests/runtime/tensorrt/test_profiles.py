"""The shapes that an engine is built for, by hand, and what cannot be asked for."""

import onnx
import pytest
from sparsify_export.passes.errors import InputError
from sparsify_export.runtime.tensorrt.profiles import Sizes, choose_sizes, parse_range, pieces, profiles_for


def onnx_file(folder, inputs):
    values = [onnx.helper.make_tensor_value_info(n, onnx.TensorProto.FLOAT, shape) for n, shape in inputs.items()]
    graph = onnx.helper.make_graph([], "g", values, [])
    path = folder / "m.trt.onnx"
    onnx.save(onnx.helper.make_model(graph), path)
    return path


def test_a_decoder_gets_a_profile_for_prompts_and_one_for_decoding(tmp_path):
    path = onnx_file(
        tmp_path,
        {
            "input_ids": ["batch_size", "sequence_length"],
            "attention_mask": ["batch_size", "total_sequence_length"],
            "past_key_values.0.key": ["batch_size", 2, "past_sequence_length", 16],
        },
    )
    assert profiles_for(path, Sizes((1, 2, 4), (1, 8, 64), 100)) == {
        "prefill": {
            "input_ids": [[1, 1], [2, 8], [4, 64]],
            "attention_mask": [[1, 1], [2, 8], [4, 100]],
            "past_key_values.0.key": [[1, 2, 0, 16], [2, 2, 0, 16], [4, 2, 36, 16]],
        },
        "decode": {
            "input_ids": [[1, 1], [2, 1], [4, 1]],
            "attention_mask": [[1, 2], [2, 51], [4, 100]],
            "past_key_values.0.key": [[1, 2, 1, 16], [2, 2, 50, 16], [4, 2, 99, 16]],
        },
    }


def test_images_get_one_profile(tmp_path):
    path = onnx_file(tmp_path, {"pixel_values": ["batch_size", 3, 32, 32]})
    sizes = choose_sizes("1,8,16", None, None, longest=None, cached=False)
    assert profiles_for(path, sizes) == {"all": {"pixel_values": [[1, 3, 32, 32], [8, 3, 32, 32], [16, 3, 32, 32]]}}


def test_what_is_not_given_comes_from_the_model():
    assert choose_sizes(None, None, None, longest=8192, cached=False) == Sizes((1, 1, 1), (1, 128, 2048), 2048)
    assert choose_sizes(None, None, None, longest=8192, cached=True) == Sizes((1, 1, 1), (1, 128, 512), 2048)
    assert choose_sizes(None, None, None, longest=64, cached=True) == Sizes((1, 1, 1), (1, 16, 16), 64)
    assert choose_sizes(None, None, 2, longest=64, cached=True) == Sizes((1, 1, 1), (1, 1, 1), 2)
    assert choose_sizes(None, "2,4,8", 4096, longest=8192, cached=True) == Sizes((1, 1, 1), (2, 4, 8), 4096)


@pytest.mark.parametrize("sequence", [None, "2,4,8", "1,8,8"])
@pytest.mark.parametrize("context", [8, 9, 2048])
def test_past_and_tokens_add_up_to_the_mask_at_every_corner(tmp_path, sequence, context):
    shapes = {"input_ids": ["batch_size", "sequence_length"], "attention_mask": ["batch_size", "total_sequence_length"]}
    path = onnx_file(tmp_path, {**shapes, "past_key_values.0.key": ["batch_size", 1, "past_sequence_length", 1]})
    for profile in profiles_for(path, choose_sizes(None, sequence, context, longest=4096, cached=True)).values():
        for ids, mask, past in zip(*profile.values(), strict=True):
            assert past[2] + ids[1] == mask[1]
        for least, typical, most in profile.values():
            assert all(a <= b <= c for a, b, c in zip(least, typical, most, strict=True))


@pytest.mark.parametrize("context", [2, 3])
def test_every_profile_is_in_order_even_for_the_shortest_context(tmp_path, context):
    path = onnx_file(tmp_path, {"past_key_values.0.key": ["batch_size", 1, "past_sequence_length", 1]})
    for shapes in profiles_for(path, choose_sizes(None, None, context, longest=8, cached=True)).values():
        for least, typical, most in shapes.values():
            assert all(a <= b <= c for a, b, c in zip(least, typical, most, strict=True))


def test_every_prompt_after_every_past_is_read_in_pieces_that_a_profile_takes():
    context, most = 23, 5  # which does not divide it
    for past in range(context):
        for tokens in range(1, context - past + 1):
            found = pieces(past, tokens, most=most, most_past=context - most)
            assert sum(found) == tokens
            cached = past
            for size in found:
                assert size == 1 or (size <= most and cached <= context - most)
                cached += size
    assert pieces(0, 16, most=8, most_past=24) == [8, 8]
    assert pieces(0, 17, most=8, most_past=24) == [1, 8, 8]
    assert pieces(30, 2, most=8, most_past=24) == [1, 1]


@pytest.mark.parametrize("text", ["1", "1,2", "a,b,c", "1,,3", "-1,2,3", "1.5,2,3", "1,2,3,4", ""])
def test_a_range_is_three_numbers(text):
    with pytest.raises(InputError, match=r"is not a range; want three numbers min,opt,max"):
        parse_range("--batch", text)


@pytest.mark.parametrize("text", ["3,2,4", "1,5,4", "0,1,2", "4,4,3"])
def test_a_range_that_contradicts_itself_is_refused(text):
    with pytest.raises(InputError, match=f"--seq {text} contradicts itself; want 1 <= min <= opt <= max"):
        parse_range("--seq", text)


def test_profiles_that_contradict_each_other_or_the_model_are_refused():
    with pytest.raises(InputError, match="--seq 1,8,64 asks for 64 tokens at once, more than the context of 32"):
        choose_sizes(None, "1,8,64", 32, longest=128, cached=True)
    with pytest.raises(InputError, match="--context 256 is longer than the 128 tokens that the model takes"):
        choose_sizes(None, None, 256, longest=128, cached=True)
    with pytest.raises(InputError, match="--context 1 is too small"):
        choose_sizes(None, None, 1, longest=128, cached=True)
