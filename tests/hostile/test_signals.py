"""Signals that ask a command to stop: its exit code says which, and nothing is left, in whatever stage it was."""

import signal

import pytest
from sparsify_export import compile, onnx_in
from sparsify_export.cli import main
from sparsify_export.signals import STOPPING, Stopped, stoppable, unstopped

STAGES = [
    (onnx_in, ["read_model", "make_sparse", "write_proto", "verify_onnx", "compare_files"]),
    (compile, ["load", "trace", "to_onnx", "verify", "build_report"]),
]


@pytest.fixture(autouse=True)
def heard():
    """Nothing is ignored, whoever started the tests: nohup ignores SIGHUP, a shell's background SIGINT and SIGQUIT."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    for number in STOPPING:
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", STOPPING, ids=lambda number: number.name)
def test_a_signal_in_every_stage_of_onnx_input(given, tmp_path, monkeypatch, capsys, number):
    before = signal.getsignal(number)
    for stage in STAGES[0][1]:
        with monkeypatch.context() as patched:
            patched.setattr(onnx_in, stage, lambda *args, **kwargs: signal.raise_signal(number))
            assert main([str(given), "--nm", "2:4", "--quiet", "-o", str(tmp_path / "o.onnx")]) == 128 + number
        assert capsys.readouterr().err == "sparsify-export: interrupted\n"
        assert [file.name for file in tmp_path.iterdir()] == ["given.onnx"]
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("stage", STAGES[1][1])
def test_a_signal_in_every_stage_of_a_pretrained_model(images, tmp_path, monkeypatch, stage):
    monkeypatch.setattr(compile, stage, lambda *args, **kwargs: signal.raise_signal(signal.SIGTERM))

    code = main([str(images), "--quiet", "-o", str(tmp_path / "out")])
    assert code == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_while_things_are_moved_signals_come_too_late():
    with stoppable():
        with unstopped():
            signal.raise_signal(signal.SIGTERM)
        with pytest.raises(Stopped):
            signal.raise_signal(signal.SIGTERM)


def test_what_nohup_ignores_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stoppable(), unstopped():
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
            signal.raise_signal(signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)
