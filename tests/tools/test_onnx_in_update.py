"""An ONNX model in, with inputs: the command fits its weights, and proves where they came from."""

import signal

import numpy as np
import onnx
import pytest
from commands import names
from exported import VOCABULARY, encoder, export, feeds
from onnx import numpy_helper
from onnx_command import compiled, refused
from onnx_models import dense, mlp, rng, saved
from sparsify_export import onnx_in
from sparsify_export.cli import main
from sparsify_export.runtime import prune_onnx
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """What torch's exporter writes, and a folder of inputs."""
    folder = tmp_path_factory.mktemp("exported")
    path = export(encoder(), folder / "encoder.onnx")
    proto = onnx.load(str(path))
    proto.metadata_props.add(key="author", value="someone")
    onnx.save(proto, str(path))
    (folder / "inputs").mkdir()
    for index, feed in enumerate(feeds()):
        np.savez(folder / "inputs" / f"{index}.npz", **feed)
    return path, folder / "inputs"


def test_with_inputs_balanced_is_the_default_and_everything_but_the_weights_stays(exported, tmp_path):
    path, inputs = exported
    report = compiled(path, tmp_path / "o.onnx", "--nm", "2:4", "--calibration-inputs", inputs, "--ops", "standard")
    told = report["settings"]
    assert (told["update"], told["mask_from"], told["hessian"], told["permute"]) == (
        "alps", "update", "attended", "none",
    )  # fmt: skip
    assert len(report["linears"]) == 12
    for entry in report["linears"]:
        assert entry["error_after"] < entry["error_before"]
        assert entry["directions"] <= entry["shape"][1]
        assert entry["sparsity"] == 0.5
    assert set(report["pruning_seconds"]) == {"propagate", "observe", "update"}
    written, given = onnx.load(str(tmp_path / "o.onnx")), onnx.load(str(path))
    assert written.graph.node == given.graph.node
    assert (written.graph.input, written.graph.output) == (given.graph.input, given.graph.output)
    assert written.opset_import == given.opset_import
    assert [t.name for t in written.graph.initializer] == [t.name for t in given.graph.initializer]
    assert ("author", "someone") in [(x.key, x.value) for x in written.metadata_props]
    assert names(tmp_path) == {"o.onnx", "o.onnx.data", "o.onnx.report.json"}


@pytest.mark.parametrize("storage", [["--dtype", "bf16"], ["--dtype", "int4"]], ids=["bf16", "int4"])
def test_updated_weights_are_packed_verified_and_swept_to_their_grid(exported, tmp_path, storage):
    path, inputs = exported
    report = compiled(path, tmp_path / "o.onnx", "--sparsity", "0.7", "--calibration-inputs", inputs, *storage)
    lowered = [entry for entry in report["linears"] if entry["op"].startswith("linear_")]
    assert len(lowered) == 12
    assert all(entry["error_after"] < entry["error_before"] for entry in lowered)
    assert {entry["quantiser"] for entry in lowered} == {"sweep" if storage[1] == "int4" else None}
    if storage[1] == "int4":
        assert sum(entry["error_quantised"] for entry in lowered) < 2 * sum(entry["error_after"] for entry in lowered)


def test_a_weight_that_was_made_from_another_one_fails_the_verification(tmp_path, monkeypatch, capsys):
    given = saved(mlp(dense(64, 64, 1), dense(64, 64, 2), dense(64, 64, 3)), tmp_path, "given.onnx")
    (tmp_path / "inputs").mkdir()
    np.savez(tmp_path / "inputs" / "a.npz", x=rng().standard_normal((100, 64)).astype(np.float32))
    real = onnx_in.prune_onnx

    def mixed(*arguments, **options):
        done = real(*arguments, **options)
        return done | {"w0": done["w1"], "w1": done["w0"]}

    monkeypatch.setattr(onnx_in, "prune_onnx", mixed)
    flags = ["--nm", "2:4", "--calibration-inputs", str(tmp_path / "inputs"), "--quiet", "-o", str(tmp_path / "o.onnx")]
    assert main([str(given), *flags]) == 4
    assert "its weight was not made from that of given.onnx" in capsys.readouterr().err
    assert {file.name for file in tmp_path.iterdir()} == {"given.onnx", "inputs", "o.onnx.failed"}


def test_little_text_is_told(tmp_path, capsys):
    given = saved(mlp(dense(16, 16, 1), dense(16, 16, 2)), tmp_path, "given.onnx")
    (tmp_path / "inputs").mkdir()
    np.savez(tmp_path / "inputs" / "a.npz", x=rng().standard_normal((3, 16)).astype(np.float32).repeat(9, axis=0))
    flags = ["--nm", "2:4", "--ops", "standard", "--calibration-inputs", str(tmp_path / "inputs")]
    assert main([str(given), *flags, "-o", str(tmp_path / "o.onnx")]) == 0
    said = " ".join(capsys.readouterr())
    assert "calibration shows 3 of the 16 directions" in " ".join(said.split())
    assert "directions that calibration shows" in said


def test_what_inputs_do_not_give_is_refused(exported, tmp_path, capsys):
    path, inputs = exported
    for flags, why in {
        "--effort best": "--effort best needs the traced model; an .onnx file takes --effort fast or balanced",
        "--permute fold": "--permute fold needs the traced model",
        "--tune halves": "--tune halves needs the traced model",
        "--distil 1": "--distil 1 needs the traced model",
        "--dtype int8 --quantise joint": "--quantise joint needs the traced model",
        "--score wanda": "--score wanda does not choose what goes: --update alps does",
    }.items():
        given = [path, "--nm", "2:4", "--calibration-inputs", inputs, *flags.split()]
        assert why in refused(capsys, tmp_path / "p.onnx", *given)


def test_text_is_read_by_the_tokenizer_beside_the_file(exported, tmp_path, capsys):
    path, _ = exported
    beside = tmp_path / "with"
    beside.mkdir()
    given = beside / "model.onnx"
    given.write_bytes(path.read_bytes())
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(VOCABULARY)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w0").save_pretrained(beside)
    ids = rng(3).integers(0, VOCABULARY, 100)
    (tmp_path / "text.txt").write_text(" ".join(f"w{i}" for i in ids))
    flags = ["--nm", "2:4", "--ops", "standard"]
    text = ["--calibration", tmp_path / "text.txt", "--seq-len", "9", "--samples", "7"]
    report = compiled(given, tmp_path / "o.onnx", *flags, *text)
    assert report["settings"]["calibration"] == str(tmp_path / "text.txt")
    assert report["settings"]["update"] == "alps"
    (tmp_path / "inputs").mkdir()
    windows = ids[:63].reshape(7, 9)
    np.savez(tmp_path / "inputs" / "a.npz", input_ids=windows, attention_mask=np.ones_like(windows))
    compiled(given, tmp_path / "p.onnx", *flags, "--calibration-inputs", tmp_path / "inputs")
    one, other = (onnx.load(str(tmp_path / name)).graph.initializer for name in ("o.onnx", "p.onnx"))
    assert [numpy_helper.to_array(t).tolist() for t in one] == [numpy_helper.to_array(t).tolist() for t in other]
    assert "has no tokenizer beside it" in refused(capsys, tmp_path / "q.onnx", path, *flags, *text)


def test_an_interruption_while_weights_are_fitted_leaves_nothing(exported, tmp_path, monkeypatch):
    path, inputs = exported

    def interrupt(*arguments, **options):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(prune_onnx, "fit_section", interrupt)
    flags = ["--nm", "2:4", "--calibration-inputs", str(inputs), "--quiet", "-o", str(tmp_path / "o.onnx")]
    assert main([str(path), *flags]) == 130
    assert not list(tmp_path.iterdir())
