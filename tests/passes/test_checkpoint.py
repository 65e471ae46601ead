"""A run that is stopped and goes on is the run that was never stopped, to the bit."""

import contextlib
import json
import os
import resource
from dataclasses import asdict, replace
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sparsify_export.calibrate.besa import Learning
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.passes.checkpoint import Checkpoint, fingerprint, to_report
from sparsify_export.passes.dialect.storage import Storage
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.frontend.batches import Batch
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.given_masks import GivenMasks
from sparsify_export.passes.recipe import Distil, Quantise, Recipe, Tune
from sparsify_export.passes.sparsify import sparsify
from toys import export, stack, weights

BALANCED = Recipe(NM(2, 4), update="alps", mask_from="update")
INT4, DISTIL = Storage("int4", 32), Distil(epochs=3, rate=0.01, tokens_per_step=1)
RECIPES = {
    "balanced": BALANCED,
    "tuned": replace(BALANCED, tune=Tune(epochs=1, tokens_per_step=40)),
    "sweep": replace(BALANCED, quantise=Quantise(INT4, "sweep")),
    "distilled": replace(BALANCED, distil=DISTIL),
    "joint": replace(BALANCED, distil=DISTIL, quantise=Quantise(INT4, "joint")),
    "distilled on the grid": replace(BALANCED, distil=DISTIL, quantise=Quantise(INT4, "sweep")),
    "rates": Recipe(Unstructured(0.5), score="wanda", allocation=Learning()),
}


def inputs(seed=3, count=9):
    generator = torch.Generator().manual_seed(seed)
    return [Batch((torch.randn(4, 10, 48, generator=generator),), None) for _ in range(count)]


class Stopped(Exception):
    pass


class Toy:
    def __init__(self):
        program = export(stack(width=48, hidden=96), torch.randn(3, 5, 48))
        self.parts, self.dense = partition(program), weights(program)

    def run(self, recipe, folder=None, *, stop=None, batches=None):
        """Returns the weights and what was done; ``stop`` is a (stage, count) at which the run is broken off."""
        params, told = dict(self.dense), []

        def progress(stage, done, total):
            told.append((stage, done))
            if (stage, done) == stop:
                raise Stopped

        done = sparsify(
            self.parts,
            params,
            recipe,
            batches or inputs(),
            output="values",
            progress=progress,
            checkpoint=folder,
        )
        return params, done, told


def assert_same(one, other):
    assert one[0].keys() == other[0].keys()
    assert all(torch.equal(one[0][key], other[0][key]) for key in one[0])
    assert one[1].blocks == other[1].blocks
    assert one[1].distilled == other[1].distilled
    assert one[1].on_grid.keys() == other[1].on_grid.keys()
    for key, its in one[1].on_grid.items():
        assert its.pattern == other[1].on_grid[key].pattern
        assert torch.equal(its.scales, other[1].on_grid[key].scales)


@pytest.mark.parametrize(
    ("name", "stop"),
    [
        ("balanced", ("pruning", 1)),
        ("tuned", ("pruning", 1)),
        ("sweep", ("pruning", 2)),
        ("rates", ("pruning", 1)),
        ("distilled", ("pruning", 2)),
        ("distilled", ("distilling", 12)),  # in the middle of the second of three epochs
        ("joint", ("distilling", 24)),
        ("joint", ("quantising", 1)),
        ("distilled on the grid", ("distilling", 17)),
    ],
)
def test_going_on_gives_what_was_not_stopped(name, stop, tmp_path):
    toy = Toy()
    whole = toy.run(RECIPES[name])
    with pytest.raises(Stopped):
        toy.run(RECIPES[name], tmp_path / "kept", stop=stop)
    again = toy.run(RECIPES[name], tmp_path / "kept")
    assert_same(again, whole)
    stages = [told for told in again[2] if told[0] == "distilling"]
    if name == "distilled" and stop[0] == "distilling":
        assert stages[0] == ("distilling", 9)  # eight steps an epoch; the first one is not done again
    assert not list(tmp_path.glob("kept/.*"))


def test_stopped_on_the_grid_and_twice(tmp_path):
    toy = Toy()
    whole = toy.run(RECIPES["joint"])
    counts = []
    for _ in range(2):
        told = []

        def progress(stage, done, total, told=told):
            told.append(stage)
            if told.count("distilling") > 10:
                raise Stopped

        with pytest.raises(Stopped):
            sparsify(
                toy.parts,
                dict(toy.dense),
                RECIPES["joint"],
                inputs(),
                output="values",
                progress=progress,
                checkpoint=tmp_path / "kept",
            )
        counts.append(len(list((tmp_path / "kept").iterdir())))
    assert counts == [4, 4]  # run.json, two blocks, the floats' training
    assert_same(toy.run(RECIPES["joint"], tmp_path / "kept"), whole)
    finished = toy.run(RECIPES["joint"], tmp_path / "kept")
    assert_same(finished, whole)
    assert ("distilling", 1) not in finished[2]


def test_another_run_is_refused(tmp_path):
    toy, kept = Toy(), tmp_path / "kept"
    toy.run(BALANCED, kept)
    for differs, recipe, options in (
        (r"the recipe \(quantise\)", RECIPES["sweep"], {}),
        (r"the recipe \(mask_from, damping\)", replace(BALANCED, mask_from="score", damping=0.5), {}),
        ("the calibration text", BALANCED, {"batches": inputs(seed=4)}),
        ("the calibration text", BALANCED, {"batches": inputs()[::-1]}),
    ):
        with pytest.raises(InputError, match=f"^{kept} holds another run: other are {differs}; give another folder$"):
            toy.run(recipe, kept, **options)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(
            InputError, match=rf"other are the number of threads \({threads} there, {threads + 1} here\);"
        ):
            toy.run(BALANCED, kept)
    finally:
        torch.set_num_threads(threads)
    key = "model.layers.1.down.weight"
    toy.dense[key] = toy.dense[key] + 1
    with pytest.raises(InputError, match="other are the weights;"):
        toy.run(BALANCED, kept)


def test_what_values_alone_do_not_tell_apart_is_another_run(tmp_path):
    """Masks and weights that changed places, and a number in the graph that no weight shows."""
    toy = Toy()
    up, down = ("model.layers.0.up.weight", "model.layers.1.up.weight")
    keep = torch.rand(96, 48, generator=torch.Generator().manual_seed(1)) < 0.5

    def given(*paths):
        masks = GivenMasks(tmp_path / "masks", {path: keep for path in paths})
        return Recipe(Unstructured(0.5), permute="none", given=masks)

    toy.run(given("layers.0.up"), tmp_path / "masks")
    with pytest.raises(InputError, match="other are the masks;"):
        toy.run(given("layers.1.up"), tmp_path / "masks")
    toy.run(BALANCED, tmp_path / "weights")
    whole = dict(toy.dense)
    toy.dense |= {up: whole[down], down: whole[up]}
    with pytest.raises(InputError, match="other are the weights;"):
        toy.run(BALANCED, tmp_path / "weights")
    toy.dense = whole
    for part in toy.parts.parts:
        for node in part.module.graph.nodes:
            if node.target is torch.ops.aten.relu.default:
                node.target = torch.ops.aten.tanh.default
        part.module.recompile()
    with pytest.raises(InputError, match="other are the model's graph;"):
        toy.run(BALANCED, tmp_path / "weights")


def test_another_version_says_which(tmp_path):
    toy = Toy()
    toy.run(BALANCED, tmp_path / "kept")
    file = tmp_path / "kept" / "run.json"
    run = json.loads(file.read_text())
    assert run["format"] == 3
    file.write_text(json.dumps({**run, "version": "0.0.1", "format": 1}))
    here = version("sparsify-export")
    why = rf"the format of checkpoints \(1 there, 3 here\), the version of sparsify-export \(0.0.1 there, {here} here\)"
    with pytest.raises(InputError, match=why):
        toy.run(BALANCED, tmp_path / "kept")


def test_folders_that_are_no_checkpoints_are_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=f"^{tmp_path} is not empty and holds no checkpoint"):
        Checkpoint.open(tmp_path, {})
    with pytest.raises(InputError, match="cannot hold a checkpoint"):
        Checkpoint.open(tmp_path / "mine.txt", {})
    for damaged in ("{", "[1]", "[" * 100_000):
        (tmp_path / "run.json").write_text(damaged)
        with pytest.raises(InputError, match="cannot hold a checkpoint"):
            Checkpoint.open(tmp_path, {})


def test_a_folder_is_refused_before_any_work(tmp_path):
    Checkpoint.check(tmp_path / "new" / "folder")
    assert not (tmp_path / "new").exists()
    Checkpoint.check(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=f"^{tmp_path} is not empty and holds no checkpoint"):
        Checkpoint.check(tmp_path)
    with pytest.raises(InputError, match=r"mine.txt is no folder that can be written"):
        Checkpoint.check(tmp_path / "mine.txt" / "below")
    (tmp_path / "run.json").write_text("{}")
    Checkpoint.check(tmp_path)


def test_what_a_killed_run_was_writing_is_no_obstacle_and_goes_at_the_end(tmp_path):
    for name in (".partial-run.json.7", ".partial-block-0.checkpoint.safetensors.7"):
        (tmp_path / name).write_text("{")
    kept = Checkpoint.open(tmp_path, {"a": 1})
    assert kept.load("block-0") is None
    kept.remove()
    assert not tmp_path.exists()


def test_a_damaged_step_is_named(tmp_path):
    toy, kept = Toy(), tmp_path / "kept"
    toy.run(BALANCED, kept)
    file = kept / "block-1.checkpoint.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"block-1.* cannot be read: .*; remove it to do that step again"):
        toy.run(BALANCED, kept)
    file.unlink()
    assert_same(toy.run(BALANCED, kept), toy.run(BALANCED))


def tensors_of(file):
    with safe_open(file, framework="pt") as stored:
        names = stored.keys()
        return {name: stored.get_tensor(name) for name in names}, stored.metadata()


def test_a_step_with_one_wrong_bit_anywhere_is_refused(tmp_path):
    kept = Checkpoint.open(tmp_path, {"a": 1})
    kept.save("step", {"x": torch.arange(6.0).reshape(2, 3), "y": torch.ones(3)}, {"n": 1.5, "text": "abc"})
    file = tmp_path / "step.checkpoint.safetensors"
    whole = file.read_bytes()
    for place in range(len(whole)):
        for bit in (0, 3, 7):
            damaged = bytearray(whole)
            damaged[place] ^= 1 << bit
            file.write_bytes(damaged)
            with contextlib.suppress(InputError):  # but for the blanks that fill up the header
                tensors, notes = kept.load("step")
                assert notes == {"n": 1.5, "text": "abc"}
                assert torch.equal(tensors["x"], torch.arange(6.0).reshape(2, 3))
                assert torch.equal(tensors["y"], torch.ones(3))
                assert tensors.keys() == {"x", "y"}


def test_a_step_that_is_zeroed_has_no_notes_or_is_of_another_run_or_place_is_refused(tmp_path):
    toy, kept = Toy(), tmp_path / "kept"
    toy.run(BALANCED, kept)
    first, second = (kept / f"block-{i}.checkpoint.safetensors" for i in (0, 1))
    whole = first.read_bytes()
    tensors, metadata = tensors_of(first)
    save_file(tensors, tmp_path / "bare")
    save_file(tensors, tmp_path / "notes", metadata={**metadata, "notes": "{"})
    toy.run(replace(BALANCED, damping=0.5), tmp_path / "other")
    for damaged in (
        whole[: len(whole) // 2] + bytes(len(whole) - len(whole) // 2),
        (tmp_path / "bare").read_bytes(),
        (tmp_path / "notes").read_bytes(),
        (tmp_path / "other" / first.name).read_bytes(),
        second.read_bytes(),
    ):
        first.write_bytes(damaged)
        with pytest.raises(InputError, match=r"block-0.* cannot be read: .*; remove it to do that step again"):
            toy.run(BALANCED, kept)


def test_a_step_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    did, sync, rename = [], os.fsync, Path.replace

    def synced(descriptor):
        did.append(("fsync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(Path, "replace", lambda self, to: did.append(("rename", to.name)) or rename(self, to))
    kept = Checkpoint.open(tmp_path / "kept", {})
    did.clear()
    kept.save("step", {"x": torch.ones(2)}, {})
    name = "step.checkpoint.safetensors"
    assert did == [("fsync", f".partial-{name}.{os.getpid()}"), ("rename", name), ("fsync", "kept")]


def test_what_is_written_is_not_copied_and_any_reader_reads_it(tmp_path):
    kept = Checkpoint.open(tmp_path, {})
    shared = torch.arange(12.0)
    tensors = {
        "whole": shared,
        "part": shared[3:7],
        "turned": shared.reshape(3, 4).T,
        "half": shared.bfloat16(),
        "flags": shared > 3,
        "none": torch.zeros(0, 5, dtype=torch.int64),
    }
    kept.save("step", tensors, {})
    found = load_file(tmp_path / "step.checkpoint.safetensors")
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) and found[name].dtype == tensors[name].dtype for name in tensors)
    large = {f"{i}": torch.ones(1 << 20) for i in range(32)}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    kept.save("large", large, {})
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10  # KiB: a quarter of 128 MiB


def test_what_is_saved_is_read_where_memory_would_begin(tmp_path):
    tensors = {
        "a": torch.randn(3),
        "b": torch.randn(64, 64),
        "c": torch.ones(5, dtype=torch.int8),
        "d": torch.randn(16),
    }
    saved = Checkpoint(tmp_path).save("step", tensors, {})
    loaded = Checkpoint(tmp_path).load("step")[0]
    for found in (saved, loaded):
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
        assert [found[name].data_ptr() % 64 for name in ("b", "d")] == [0, 0]


def test_removing_leaves_what_is_not_ours(tmp_path):
    one, other = (Checkpoint.open(tmp_path / name, {"a": 1}) for name in ("one", "other"))
    for kept in (one, other):
        kept.save("step", {"x": torch.zeros(0), "y": torch.ones(2, 3).T}, {"n": 1.5})
        tensors, notes = kept.load("step")
        assert notes == {"n": 1.5}
        assert torch.equal(tensors["y"], torch.ones(3, 2))
        assert tensors["x"].shape == (0,)
        assert kept.load("other") is None
    (other.folder / "mine.txt").write_text("mine")
    one.remove()
    other.remove()
    assert [file.name for file in tmp_path.rglob("*")] == ["other", "mine.txt"]


def test_reports_survive_json():
    done = Toy().run(replace(RECIPES["tuned"], quantise=Quantise(INT4, "sweep"), skip=("layers.0.up",)))[1]
    assert any(block.folds for block in done.blocks)
    for block in done.blocks:
        assert to_report(json.loads(json.dumps(asdict(block)))) == block


def test_a_fingerprint_tells_types_shapes_and_names_apart():
    assert fingerprint(BALANCED, {"a": torch.ones(2)}, []) != fingerprint(BALANCED, {"b": torch.ones(2)}, [])
    zeros = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.zeros(8, dtype=torch.half)]
    found = {fingerprint(BALANCED, {"w": zero}, [])["weights"] for zero in zeros}
    assert len(found) == len(zeros)
