"""A run that is stopped and goes on is the run that was never stopped, to the bit."""

import json
from dataclasses import asdict, replace

import pytest
import torch
from sparsify_export.calibrate.besa import Learning
from sparsify_export.calibrate.patterns import NM, Unstructured
from sparsify_export.passes.checkpoint import Checkpoint, fingerprint, to_report
from sparsify_export.passes.dialect.storage import Storage
from sparsify_export.passes.errors import InputError
from sparsify_export.passes.frontend.batches import Batch
from sparsify_export.passes.fx.partition import partition
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
    why = f"^{kept} holds a run of another model, recipe or text; give another folder"
    with pytest.raises(InputError, match=why):
        toy.run(RECIPES["sweep"], kept)
    with pytest.raises(InputError, match=why):
        toy.run(BALANCED, kept, batches=inputs(seed=4))
    key = "model.layers.1.down.weight"
    toy.dense[key] = toy.dense[key] + 1
    with pytest.raises(InputError, match=why):
        toy.run(BALANCED, kept)


def test_folders_that_are_no_checkpoints_are_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(InputError, match=f"^{tmp_path} is not empty and holds no checkpoint"):
        Checkpoint.open(tmp_path, {})
    with pytest.raises(InputError, match="cannot hold a checkpoint"):
        Checkpoint.open(tmp_path / "mine.txt", {})
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(InputError, match="cannot hold a checkpoint"):
        Checkpoint.open(tmp_path, {})


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


def test_a_fingerprint_tells_types_and_shapes_apart():
    zeros = [torch.zeros(4), torch.zeros(2, 2), torch.zeros(4, dtype=torch.int32), torch.zeros(8, dtype=torch.half)]
    found = {fingerprint(BALANCED, {"w": zero}, [])["weights"] for zero in zeros}
    assert len(found) == len(zeros)
