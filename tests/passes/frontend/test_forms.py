"""What a checkpoint holds beyond its model, and forms in which there is none: refused by name, or told."""

import contextlib
import json
import shutil

import gguf
import numpy as np
import pytest
import torch
import transformers
from families import GROUPED, TEXT, WIDE
from safetensors.torch import load_file, save_file
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.frontend.load import load
from sparsify_export.passes.mapped import is_mapped

TWO = {**GROUPED, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "llama"
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**TWO)).save_pretrained(path)
    return path


@pytest.fixture
def folder(checkpoint, tmp_path):
    """A copy that a test may change."""
    return shutil.copytree(checkpoint, tmp_path / "model")


def add(folder, **tensors):
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, **tensors}, folder / "model.safetensors", metadata={"format": "pt"})


def configure(folder, **values):
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("model.layers.0.self_attn.q_proj.bias", "without them it would be another model"),
        ("model.layers.2.mlp.up_proj.weight", "fewer layers than the checkpoint holds"),
        ("model.layers.0.self_attn.q_proj.lora_A.weight", "an adapter's: merge it"),
        ("model.layers.0.mlp.up_proj.SCB", "codes of a quantiser; want float weights"),
        ("model.layers.1.self_attn.q_norm.weight", "without them it would be another model"),
        ("lm_head.bias", "without them it would be another model"),
    ],
)
def test_tensors_that_belong_to_the_model_are_refused_by_name(folder, name, why):
    add(folder, **{name: torch.ones(4)})
    with pytest.raises(
        InputError, match=rf"holds 1 tensors that LlamaForCausalLM does not take, e\.g\. {name}; .*{why}"
    ):
        load(str(folder))


@pytest.mark.parametrize("layers", [1, 0, -1])
def test_layers_that_the_configuration_drops_are_refused(folder, layers):
    configure(folder, num_hidden_layers=layers)
    with pytest.raises(
        InputError, match=r"tensors that LlamaForCausalLM does not take.*fewer layers than the checkpoint"
    ):
        load(str(folder))


def test_modules_that_the_class_does_not_have_are_told(folder):
    add(
        folder,
        **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)},  # declared ignorable by transformers
        **{"vision_tower.encoder.layers.0.fc1.weight": torch.ones(4, 4), "score.weight": torch.ones(2, 64)},
    )
    assert load(str(folder)).notes == (
        "score of the checkpoint is left out: LlamaForCausalLM has none",
        "vision_tower of the checkpoint is left out: LlamaForCausalLM has none",
    )


def test_a_pooler_under_a_language_model_does_not_stop_it(tmp_path):
    transformers.BertForPreTraining(transformers.BertConfig(**WIDE, **TEXT)).save_pretrained(tmp_path)
    configure(tmp_path, architectures=["BertForMaskedLM"])
    loaded = load(str(tmp_path))
    assert type(loaded.model) is transformers.BertForMaskedLM
    assert all("left out" in note for note in loaded.notes)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda f: (f / "adapter_config.json").write_text("{}"), "holds an adapter beside the model.*merge it"),
        (
            lambda f: [(f / "adapter_config.json").write_text("{}"), (f / "config.json").unlink()],
            "is an adapter: merge it",
        ),
        (
            lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"),
            r"its weights are pickled \(pytorch_model\.bin\).*save_pretrained writes model\.safetensors",
        ),
        (
            lambda f: configure(f, quantization_config={"quant_method": "gptq", "bits": 4}),
            r"quantised already \(gptq\); want the float weights",
        ),
        (
            lambda f: configure(f, model_type="own", auto_map={"AutoConfig": "own.Own"}),
            "needs Python code that comes with it; where you trust that, give --trust-remote-code",
        ),
    ],
    ids=["adapter beside", "adapter", "pickle", "gptq", "code"],
)
def test_forms_that_cannot_be_read_say_what_to_do(folder, change, why):
    change(folder)
    with pytest.raises(InputError, match=why) as refusal:
        load(str(folder))
    assert "\n" not in str(refusal.value)


def write_gguf(path, *, layers=1, extra=(), scaling=None):
    """A Llama of one layer as GGUF."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(layers)
    writer.add_context_length(128)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(128)
    writer.add_head_count(4)
    writer.add_head_count_kv(4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(1e4)
    writer.add_vocab_size(32)
    if scaling is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([f"t{i}" for i in range(32)])
    writer.add_token_merges(["t 1"])
    shapes = {"token_embd": (32, 64), "output": (32, 64), "output_norm": (64,), "blk.0.attn_norm": (64,)}
    shapes |= {f"blk.0.attn_{name}": (64, 64) for name in ("q", "k", "v", "output")}
    shapes |= {"blk.0.ffn_norm": (64,), "blk.0.ffn_gate": (128, 64), "blk.0.ffn_up": (128, 64)}
    shapes |= {"blk.0.ffn_down": (64, 128)}
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        writer.add_tensor(f"{name}.weight", rng.standard_normal(shape, np.float32))
    for name in extra:
        writer.add_tensor(name, np.ones(8, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_tensors_of_a_gguf_file_go_into_files_before_they_are_parameters(tmp_path, monkeypatch):
    monkeypatch.setattr("sparsify_export.passes.mapped.LEAST", 1)
    monkeypatch.setattr("sparsify_export.passes.frontend.load.parameters_mapped", contextlib.nullcontext)
    found = load(str(write_gguf(tmp_path / "a.gguf"))).model
    assert all(is_mapped(parameter) for parameter in found.parameters())


def test_a_gguf_file_is_taken_whole_or_refused_by_name(tmp_path):
    assert load(str(write_gguf(tmp_path / "a.gguf"))).kind == "causal"
    for name in ("rope_freqs.weight", "blk.0.attn_q.bias", "blk.1.attn_norm.weight"):
        with pytest.raises(InputError, match=rf"holds 1 tensors that LlamaForCausalLM .* does not take, e\.g\. {name}"):
            load(str(write_gguf(tmp_path / "b.gguf", extra=[name])))
    with pytest.raises(InputError, match=r"says llama\.rope\.scaling\.\w+ = .*, which transformers drops"):
        load(str(write_gguf(tmp_path / "c.gguf", scaling=4.0)))
    with pytest.raises(InputError, match="with 0 layers does not take"):
        load(str(write_gguf(tmp_path / "d.gguf", layers=0)))
