"""How much text is calibrated on, by tokens."""

import pytest
from command_models import WORDS
from commands import refused
from encoders import encoder
from encoders import tokenizer as encoders_tokenizer
from sparsify_export.calibrate.patterns import NM
from sparsify_export.calibration_data import calibration_text
from sparsify_export.passes.frontend.load import load
from sparsify_export.passes.recipe import Recipe
from sparsify_export.settings import SILENT, Calibration, Settings
from sparsify_export.stages import Stages


def read(source, path, **said):
    settings = Settings(Recipe(NM(2, 4)), Calibration(str(path), **said))
    return calibration_text(load(str(source)), settings, Stages(), SILENT)


def test_windows_hold_the_tokens_that_were_asked_for(folder, text):
    windows, held_out = read(folder, text, tokens=100, length=32)
    assert windows.shape == (4, 32)
    assert held_out.shape == (1, 32)
    same, _ = read(folder, text, samples=4, length=32)
    assert same.tolist() == windows.tolist()
    assert read(folder, text, tokens=96, length=32)[0].shape == (3, 32)


def test_the_models_own_text_too(folder):
    assert read(folder, "self", tokens=40, length=16)[0].shape == (3, 16)


def test_encoders_read_texts_until_they_have_them(tmp_path):
    encoder("classifier").save_pretrained(tmp_path / "model")
    encoders_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n\n".join(f"{word} w1 w2" for word in WORDS[:40]))
    texts, held_out = read(tmp_path / "model", tmp_path / "text.txt", tokens=50, length=10)
    assert texts.tokens == 50  # ten texts of five tokens, and the one behind them
    assert held_out.shape == (1, 5)
    every, nothing = read(tmp_path / "model", tmp_path / "text.txt", tokens=10**6, length=10)
    assert (len(every), nothing) == (40, None)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        (["--nm", "2:4", "--tokens", "0"], "--tokens 0 is too small; want 1 or more"),
        (["--nm", "2:4", "--tokens", "9", "--samples", "2"], "--samples 2 and --tokens 9 were both given"),
        (["--tokens", "9"], "--tokens 9 has no effect without --nm or --sparsity"),
        (
            ["--nm", "2:4", "--tokens", "9", "--calibration-inputs", "x"],
            "--tokens 9 has no effect beside --calibration",
        ),
    ],
)
def test_tokens_without_effect_are_refused(folder, tmp_path, capsys, flags, why):
    assert why in refused(capsys, tmp_path / "o.onnx", folder, *flags).replace("--tokens has", "--tokens 9 has")


def test_an_onnx_file_without_a_text_reads_none(given, tmp_path, capsys):
    said = refused(capsys, tmp_path / "o.onnx", given, "--nm", "2:4", "--tokens", "9")
    assert "--tokens has no effect on an .onnx file without --calibration TEXT" in said
