"""What lies beside the model in a folder, read back by the tools that it is for; and texts up to the context."""

import json

import onnx
import pytest
import torch
import transformers
from commands import refused
from families import random_model
from sparsify_export.cli import main
from sparsify_export.model_folder import write_configuration
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.frontend.load import describe
from sparsify_export.runtime.artifact import context_of


def test_a_configuration_names_its_class_and_no_quantisation_of_the_source(tmp_path):
    model = random_model("llama")
    model.config.architectures = None  # as a GGUF file has it
    model.config.quantization_config = {"quant_method": "gguf"}
    write_configuration(describe(model, source="m.gguf"), tmp_path)
    told = json.loads((tmp_path / "config.json").read_text())
    assert told["architectures"] == ["LlamaForCausalLM"]
    assert "quantization_config" not in told
    assert type(transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.from_pretrained(tmp_path))) is (
        transformers.LlamaForCausalLM
    )
    assert model.config.quantization_config == {"quant_method": "gguf"}  # the model's own is left alone


def test_a_generation_config_that_contradicts_itself_is_kept(tmp_path):
    model = random_model("llama")
    model.generation_config.temperature = 0.5  # without do_sample, as some are published
    write_configuration(describe(model), tmp_path)
    assert json.loads((tmp_path / "generation_config.json").read_text())["temperature"] == 0.5


@pytest.fixture
def sentences(tmp_path):
    """A folder of sentence-transformers."""
    path = tmp_path / "sentences"
    random_model("bert").save_pretrained(path)
    modules = [{"idx": 0, "path": "", "type": "Transformer"}, {"idx": 1, "path": "1_Pooling", "type": "Pooling"}]
    (path / "modules.json").write_text(json.dumps(modules))
    (path / "sentence_bert_config.json").write_text('{"max_seq_length": 64}')
    (path / "1_Pooling").mkdir()
    (path / "1_Pooling" / "config.json").write_text('{"pooling_mode_mean_tokens": true}')
    (path / "1_Pooling" / "run.py").write_text("")
    return path


def test_how_sentences_are_pooled_is_kept_and_can_be_overwritten(sentences, tmp_path):
    out = tmp_path / "out"
    for flags in ([], ["--overwrite"]):
        assert main([str(sentences), "--quiet", *flags, "-o", str(out)]) == 0
        for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json"):
            assert (out / name).read_bytes() == (sentences / name).read_bytes()
        assert not (out / "1_Pooling" / "run.py").exists()


@pytest.mark.parametrize("path", ["../elsewhere", "/etc"])
def test_modules_outside_the_folder_are_not_read(sentences, tmp_path, path):
    (sentences / "modules.json").write_text(json.dumps([{"path": path}]))
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="want folders inside"):
        write_configuration(describe(random_model("bert"), source=str(sentences)), tmp_path / "out")


@pytest.fixture(scope="module")
def short(folder, tmp_path_factory):
    """A GPT-2 with a table of 24 positions, as it was and exported into a folder."""
    path = tmp_path_factory.mktemp("short")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=99, n_positions=24, n_embd=32, n_layer=1, n_head=2)
    transformers.GPT2LMHeadModel(config).save_pretrained(path / "model")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / "model" / name).write_bytes((folder / name).read_bytes())
    assert main([str(path / "model"), "--quiet", "-o", str(path / "out")]) == 0
    return path


def test_eval_and_generate_stop_at_the_context(short, text, capsys):
    assert context_of(short / "out") == context_of(short / "out" / "model.onnx") == 24
    for model in (short / "model", short / "out"):
        assert main(["eval", str(model), "--text", str(text)]) == 0
        assert "windows of 24 tokens" in capsys.readouterr().out
        assert main(["eval", str(model), "--text", str(text), "--window", "25"]) == 2
        assert "--window 25 is more than the 24 tokens" in capsys.readouterr().err
        assert main(["eval", str(model), "--exact"]) == 2
        assert "and the model takes 24" in capsys.readouterr().err
    assert main(["generate", str(short / "out"), "--prompt", "w1 w2 w3", "--max-new-tokens", "50"]) == 0
    assert "decode 20 at" in capsys.readouterr().out  # 21 new tokens, the first of which the prompt's run gives
    assert main(["generate", str(short / "out"), "--prompt", " ".join(["w1"] * 24)]) == 2
    assert "the prompt has 24 tokens" in capsys.readouterr().err


def test_a_file_by_itself_knows_its_context(short, folder, text, tmp_path, capsys):
    for file in (short / "out").iterdir():
        if file.name.startswith("model.onnx"):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    command = ["eval", str(tmp_path / "model.onnx"), "--tokenizer", str(folder), "--text", str(text)]
    assert main(command) == 0
    assert "windows of 24 tokens" in capsys.readouterr().out
    model = onnx.load(tmp_path / "model.onnx", load_external_data=False)
    for said in ("[", "true", "-3", '"24"'):  # what anybody may have written is no reason to fail
        for entry in model.metadata_props:
            if entry.key == "sparsify.context":
                entry.value = said
        onnx.save(model, tmp_path / "model.onnx")
        assert context_of(tmp_path / "model.onnx") is None
    assert main(command) == 2
    (said,) = capsys.readouterr().err.strip().splitlines()
    assert "the model fails on a text of 600 tokens, which is more than it takes" in said


def test_a_folder_that_we_wrote_is_named_as_what_it_is(short, tmp_path, capsys):
    said = refused(capsys, tmp_path / "again.onnx", short / "out", "--nm", "2:4")
    assert "holds an ONNX model and no other weights; give" in said


def test_a_first_token_outside_the_vocabulary(short, tmp_path, capsys):
    path = tmp_path / "model"
    path.mkdir()
    for file in (short / "model").iterdir():
        (path / file.name).write_bytes(file.read_bytes())
    told = json.loads((path / "config.json").read_text()) | {"bos_token_id": 50256}
    (path / "config.json").write_text(json.dumps(told))
    said = refused(capsys, tmp_path / "o.onnx", path, "--nm", "2:4", "--samples", "2", "--seq-len", "8")
    assert "begins a text with token 50256; the model knows 0 to 98" in said


@pytest.fixture(scope="module")
def passages(tmp_path_factory):
    """A collection of 40 passages that are findable by the words they share with their query."""
    path = tmp_path_factory.mktemp("collection")
    (path / "qrels").mkdir()
    texts = [" ".join(f"w{(7 * i + j) % 90}" for j in range(8)) for i in range(40)]
    (path / "corpus.jsonl").write_text("\n".join(json.dumps({"_id": f"p{i}", "text": t}) for i, t in enumerate(texts)))
    queries = [{"_id": f"q{i}", "text": t[:11]} for i, t in enumerate(texts)]
    (path / "queries.jsonl").write_text("\n".join(map(json.dumps, queries)))
    (path / "qrels" / "test.tsv").write_text("\n".join(f"q{i}\tp{i}\t1" for i in range(40)))
    return path


def test_a_folder_finds_passages_as_its_model_does(sentences, folder, passages, tmp_path, capsys):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (sentences / name).write_bytes((folder / name).read_bytes())
    torch.manual_seed(0)
    transformers.BertModel(random_model("bert").config).save_pretrained(sentences)
    assert main([str(sentences), "--quiet", "-o", str(tmp_path / "out")]) == 0
    capsys.readouterr()
    found = []
    for model in (sentences, tmp_path / "out"):
        assert main(["eval", str(model), "--retrieval", str(passages), "--json"]) == 0
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1]
    assert found[0]["pooling"]["length"] == 64
    assert 0.3 < found[0]["retrieval"]["ndcg"] < 1  # chance is 0.11
    (sentences / "sentence_bert_config.json").unlink()  # then the model's own positions are the limit
    assert main(["eval", str(sentences), "--retrieval", str(passages), "--json"]) == 0
    longest = random_model("bert").config.max_position_embeddings
    assert json.loads(capsys.readouterr().out)["pooling"]["length"] == longest
    assert main(["eval", str(tmp_path / "out"), "--retrieval", str(passages)]) == 0
    assert "over 40 queries and 40 passages\npooled by mean, 64 tokens" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text", "x"], "--text has no effect with --retrieval"),
        (["--no-bos"], "--no-bos has no effect with --retrieval"),
        ([], "is not an encoder of texts"),
    ],
)
def test_what_finds_no_passages_is_refused(folder, passages, flags, message, capsys):
    assert main(["eval", str(folder), "--retrieval", str(passages), *flags]) == 2
    assert message in capsys.readouterr().err
