"""What becomes of the architectures of the list: some as graphs, all by the command (make architectures)."""

import pytest

from .listed import ENTRIES
from .outcomes import graph_outcome, outcome

QUICK = [
    "AlbertForMaskedLM",
    "DebertaV2ForMaskedLM",
    "MPNetForMaskedLM",
    "FNetForMaskedLM",
    "SqueezeBertForMaskedLM",
    "BloomForCausalLM",
    "Gemma2ForCausalLM",
    "FalconForCausalLM",
    "Gemma3TextModel",
    "BertForMultipleChoice",
    "SiglipModel",
    "LongformerForMaskedLM",
    "MambaForCausalLM",
    "T5ForConditionalGeneration",
]
BY_NAME = {entry.name: entry for entry in ENTRIES}


def test_no_two_entries_have_one_name():
    assert len(BY_NAME) == len(ENTRIES) == 215


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", QUICK)
def test_some_as_graphs(name):
    entry = BY_NAME[name]
    got = graph_outcome(entry)
    assert got.result == ("refused" if entry.refused else "compiled"), got.said
    assert entry.refused in got.said


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", BY_NAME)
def test_all_by_the_command(name, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    entry = BY_NAME[name]
    got = outcome(entry, tmp_path)
    assert got.result == ("refused" if entry.refused else "compiled"), got.said
    assert entry.refused in got.said
    if not entry.refused:
        assert got.share >= entry.share
