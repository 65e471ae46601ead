"""Loading what can be loaded, refusing the rest, and never running code that came with a checkpoint."""

import json
import os
import pickle
import shutil

import pytest
import torch
import transformers
from families import CAUSAL, FAMILIES, GROUPED, random_model
from safetensors.torch import load_file, save_file
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.frontend.load import describe, load, load_tokenizer
from sparsify_export.passes.mapped import LEAST, is_mapped

SMALL = {**GROUPED, "num_hidden_layers": 1}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint")
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMALL)).save_pretrained(path)
    return path


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy that a test may damage."""
    return shutil.copytree(checkpoint, tmp_path / "model")


@pytest.mark.parametrize("name", FAMILIES)
def test_kinds_and_inputs_of_every_family(name):
    pretrained = describe(random_model(name))
    inputs = {"bert": ("input_ids", "attention_mask", "token_type_ids"), "vit": ("pixel_values",)}
    assert pretrained.kind == ("causal" if name in CAUSAL else "encoder")
    assert pretrained.inputs == inputs.get(name, ("input_ids", "attention_mask"))
    assert not pretrained.model.training
    assert not any(p.requires_grad for p in pretrained.model.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_what_was_saved_is_loaded_in_float32(name, tmp_path):
    model = random_model(name).to(torch.bfloat16)
    model.save_pretrained(tmp_path)
    found = load(str(tmp_path))
    assert type(found.model) is type(model)
    assert found.tokenizer is None
    assert found.source == str(tmp_path)
    loaded = found.model.state_dict()
    assert all(torch.equal(loaded[key], value.float()) for key, value in model.state_dict().items())
    assert {p.dtype for p in found.model.parameters()} == {torch.float32}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_was_loaded_lies_in_files(tmp_path, monkeypatch, dtype):
    monkeypatch.delenv("HF_DEACTIVATE_ASYNC_LOAD", raising=False)
    config = transformers.LlamaConfig(**(SMALL | {"vocab_size": 4000}), tie_word_embeddings=True)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    model.save_pretrained(tmp_path)
    found = load(str(tmp_path)).model
    large = [p for p in found.parameters() if p.numel() * p.element_size() >= LEAST]
    assert large
    assert all(is_mapped(p) for p in large)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert torch.equal(found.lm_head.weight, model.lm_head.weight.float())
    assert "HF_DEACTIVATE_ASYNC_LOAD" not in os.environ


def test_what_is_no_model_is_refused(tmp_path):
    for name, content in (("x.gguf", b"GGML"), ("y.gguf", b""), ("x.onnx", b""), ("x.bin", b"")):
        (tmp_path / name).write_bytes(content)
    for name, why in {
        "missing": "does not exist",
        "": "the folder has no config.json",
        "x.gguf": "is not a GGUF file: it starts with b'GGML', not b'GGUF'",
        "y.gguf": "is not a GGUF file: it starts with b''",
        "x.onnx": "is an ONNX model; this version compiles",
        "x.bin": r"is not a model: want a Hugging Face folder or a \.gguf file",
    }.items():
        with pytest.raises(InputError, match=why):
            load(str(tmp_path / name))


def damage_config(folder):
    (folder / "config.json").write_text("{")


def unknown_type(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "no_such_model"}))


def cut_weights(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def damage_header(folder):
    file = folder / "model.safetensors"
    file.write_bytes(b"\xff" * 16 + file.read_bytes()[16:])


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def lose_a_weight(folder):
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.0.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def wrong_shape(folder):
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = torch.zeros(3, 3)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def put_nan(folder):
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][1] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "why"),
    [
        (damage_config, r"config\.json is damaged: it is not JSON"),
        (unknown_type, "cannot load .*no_such_model"),
        (cut_weights, "cannot load"),
        (damage_header, "cannot load"),
        (no_weights, "cannot load .*model.safetensors"),
        (lose_a_weight, r"is damaged: it lacks 1 weights of the model, e\.g\. model\.layers\.0\.mlp\.up_proj\.weight"),
        (wrong_shape, "cannot load"),
        (put_nan, r"is damaged: model\.norm\.weight holds NaN or infinity"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_damaged_folders_are_refused(folder, damage, why):
    damage(folder)
    with pytest.raises(InputError, match=why) as refusal:
        load(str(folder))
    assert "\n" not in str(refusal.value)


def test_a_folder_without_a_vocabulary_has_no_tokenizer(folder):
    assert load(str(folder)).tokenizer is None
    with pytest.raises(InputError, match="has no tokenizer that can be read"):
        load_tokenizer(str(folder))


class Touch:
    """Unpickled, this writes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_pickled_weights_are_never_read(folder, tmp_path):
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Touch(tmp_path / "ran")))
    with pytest.raises(InputError, match="cannot load"):
        load(str(folder))
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def with_code(folder, tmp_path, monkeypatch):
    """A folder whose own Python files would leave a trace, and nobody at the terminal to ask."""
    monkeypatch.setattr("builtins.input", lambda *args: pytest.fail("asked whether to run code"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    trace = f"open({str(tmp_path / 'ran')!r}, 'w')\n"
    for name in ("configuration_own.py", "modeling_own.py", "tokenization_own.py"):
        (folder / name).write_text(trace)
    return folder


OWN = {"AutoConfig": "configuration_own.Own", "AutoModelForCausalLM": "modeling_own.Own"}


@pytest.mark.parametrize("known", [True, False], ids=["a known model type", "an unknown model type"])
def test_code_of_a_checkpoint_is_not_run(with_code, tmp_path, known):
    config = json.loads((with_code / "config.json").read_text())
    config |= {"auto_map": OWN} | ({} if known else {"model_type": "own", "architectures": ["Own"]})
    (with_code / "config.json").write_text(json.dumps(config))
    if known:
        assert type(load(str(with_code)).model) is transformers.LlamaForCausalLM
    else:
        with pytest.raises(InputError, match="cannot load"):
            load(str(with_code))
    assert not (tmp_path / "ran").exists()


def test_code_of_a_tokenizer_is_not_run(with_code, tmp_path):
    own = {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["tokenization_own.Own", None]}}
    (with_code / "tokenizer_config.json").write_text(json.dumps(own))
    with pytest.raises(InputError, match="has no tokenizer that can be read"):
        load_tokenizer(str(with_code))
    assert load(str(with_code)).tokenizer is None
    assert not (tmp_path / "ran").exists()


def test_a_model_in_memory_with_nan_is_refused():
    model = random_model("opt")
    model.lm_head.weight[0, 0] = float("inf")
    with pytest.raises(InputError, match=r"model is damaged: .*weight holds NaN or infinity"):
        describe(model)
