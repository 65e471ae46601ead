"""What is measured, when, and what is remembered; no time is asserted."""

import json

import pytest
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.passes.cost import DENSE, Speed
from sparsify_export.passes.dialect.storage import FP32, Storage
from sparsify_export.passes.form import Form
from sparsify_export.runtime import machine
from sparsify_export.runtime.machine import Machine, measure_dense, measure_sparse, this_machine

SLOW = Speed(0.0, (2e-9,) * 3, (2e-9,) * 3)
QUICK = Speed(0.0, (1e-9,) * 3, (1e-9,) * 3)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "sparsify-export"


@pytest.fixture
def asked(monkeypatch):
    """Stands in for the measurements: sparse is quick for N:M and slow otherwise; lists what was measured."""
    names: list[str] = []

    def sparse(pattern, storage):
        names.append(f"{pattern} {storage.kind}")
        return QUICK if isinstance(pattern, NM) else SLOW

    monkeypatch.setattr(machine, "measure_sparse", sparse)
    monkeypatch.setattr(
        machine, "measure_dense", lambda: names.append("dense") or Speed(0.0, (1.5e-9,) * 3, (1.5e-9,) * 3)
    )
    return names


@pytest.fixture
def small(monkeypatch):
    """Measure layers so small that it takes no time."""
    for name, value in {"FEATURES": 256, "STREAMED": 1, "RUNS": dict.fromkeys((1, 16, 256), 1)}.items():
        monkeypatch.setattr(machine, name, value)


@pytest.mark.parametrize("storage", [Storage(), Storage("bf16"), Storage("int8"), Storage("int4", 32)], ids=str)
@pytest.mark.parametrize("pattern", [NM(2, 4), NM(3, 5), Unstructured(0.7)], ids=str)
def test_every_format_can_be_measured(pattern, storage, small):
    speed = measure_sparse(pattern, storage)
    assert speed.overhead > 0
    assert all(figure >= 0 for figure in (*speed.empty, *speed.full))


def test_dense_can_be_measured(small):
    speed = measure_dense()
    assert speed.empty == speed.full


FORMS = [
    Form(),
    Form(None, Storage("int8", blocked=True)),
    Form(None, Storage("int4", 32, blocked=True)),
    *(Form(pattern, storage) for pattern in (NM(2, 4), Unstructured(0.7)) for storage in (FP32, Storage("int8"))),
]


@pytest.mark.parametrize("tokens", [1, 40])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_can_be_timed_in_a_layer_of_its_own_size(form, bias, tokens, small):
    assert machine.measure_layer(form, 48, 64, tokens=tokens, layers=3, bias=bias) > 0


def test_layers_are_as_many_as_the_model_has_numbers_and_are_timed_once(cache, monkeypatch):
    asked = []
    monkeypatch.setattr(machine, "measure_layer", lambda form, *size, **how: asked.append((form, size, how)) or 1e-3)
    given = {"tokens": 1, "weights": 100 * 64 * 64, "bias": False}
    assert this_machine().seconds(Form(), 64, 64, **given) == this_machine().seconds(Form(), 64, 64, **given) == 1e-3
    assert [how["layers"] for _, _, how in asked] == [100]
    this_machine().seconds(Form(), 4096, 4096, **{**given, "weights": 1 << 40})  # no more than a cache holds twice
    this_machine().seconds(Form(), 64, 64, **{**given, "tokens": 128})
    this_machine().seconds(Form(), 64, 64, **{**given, "bias": True})
    assert [how["layers"] for _, _, how in asked[1:]] == [4, 4, 100]


def test_each_format_is_measured_once_and_only_when_it_is_asked_for(cache, asked):
    worth = this_machine().worth(Storage(), tokens=1)
    assert asked == []
    assert worth(NM(2, 4), 64, 64, 2048) == ""
    assert worth(NM(2, 4), 128, 64, 4096) == ""
    assert asked == ["2:4 fp32", "dense"]
    assert worth(Unstructured(0.5), 64, 64, 2048).startswith("sparse would take 8.2 us for 1 token here, dense 6.1 us")
    assert worth(Unstructured(0.9), 64, 64, 410) != ""
    assert asked == ["2:4 fp32", "dense", "0.5 fp32"]


def test_figures_are_read_again(cache, asked):
    this_machine().worth(Storage(), tokens=1)(NM(2, 4), 64, 64, 2048)
    again = this_machine()
    assert again.speeds == {DENSE: Speed(0.0, (1.5e-9,) * 3, (1.5e-9,) * 3), "linear_nm 2:4 fp32": QUICK}
    again.worth(Storage(), tokens=16)(NM(2, 4), 64, 64, 2048)
    assert asked == ["2:4 fp32", "dense"]
    assert [file.suffix for file in cache.iterdir()] == [".json"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: "{}",
        lambda text: text.replace("1e-09", "-1e-09"),
        lambda text: text.replace("1e-09", "NaN"),
        lambda text: text.replace("1e-09", '"quick"'),
        lambda text: text.replace('"empty"', '"empt"'),
        lambda text: text.replace('"threads": ', '"threads": 9'),
        lambda text: json.dumps({"key": json.loads(text)["key"], "speeds": [1]}),
        lambda text: "\0\xff",
    ],
)
def test_a_damaged_file_is_measured_again(damage, cache, asked):
    worth = this_machine().worth(Storage(), tokens=1)
    worth(NM(2, 4), 64, 64, 2048)
    (file,) = cache.iterdir()
    whole = file.read_text()
    file.write_text(damage(whole), encoding="latin-1")
    assert this_machine().speeds == {}
    this_machine().worth(Storage(), tokens=1)(NM(2, 4), 64, 64, 2048)
    assert file.read_text() == whole


def test_other_processors_versions_and_threads_have_files_of_their_own(cache, asked, monkeypatch):
    files = {this_machine().file}
    with monkeypatch.context() as patch:
        patch.setattr(machine, "_processor", lambda: "another")
        files.add(this_machine().file)
    with monkeypatch.context() as patch:
        patch.setattr(machine.ort, "__version__", "0.0.0")
        files.add(this_machine().file)
    with monkeypatch.context() as patch:
        patch.setattr(machine.os, "sched_getaffinity", lambda pid: range(99), raising=False)
        files.add(this_machine().file)
    assert len(files) == 4


def test_a_folder_that_cannot_be_written_costs_only_the_memory(tmp_path, asked):
    (tmp_path / "file").write_text("")
    elsewhere = Machine({"processor": "x"}, file=tmp_path / "file" / "machine.json")
    assert elsewhere.worth(Storage(), tokens=1)(NM(2, 4), 64, 64, 2048) == ""
    assert DENSE in elsewhere.speeds
