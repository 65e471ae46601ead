"""Encoders at best: each is trained by the output that counts, and goes on from where it was stopped."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from encoders import WORDS, encoder, tokenizer, write_sentences
from sparsify_export.calibrate.patterns import NM
from sparsify_export.calibration_data import text_batches
from sparsify_export.cli import main
from sparsify_export.objective import output_of
from sparsify_export.passes.frontend.batches import Batch, read_texts
from sparsify_export.passes.frontend.load import describe, load
from sparsify_export.passes.frontend.trace import trace
from sparsify_export.passes.fx.canonical import canonicalise
from sparsify_export.passes.fx.partition import partition
from sparsify_export.passes.fx.run import run_model, run_part
from sparsify_export.passes.outputs import Pooled
from sparsify_export.passes.recipe import Distil, Moves, Recipe
from sparsify_export.passes.sparsify import sparsify
from sparsify_export.runtime.embedding import Embedder, embed, onnx_hidden, torch_hidden
from sparsify_export.runtime.session import open_session

WANTED = {
    "embedding": "values",
    "classifier": "classes",
    "reranker": "values",
    "labels": "labels",
    "tokens": "classes",
    "pictures": "classes",
    "picture states": "values",
}
RECIPE = Recipe(NM(2, 4), score="magnitude", distil=Distil(4, 0.01, 60))  # without an update there is most to learn


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Texts of 3 to 20 words."""
    draw = np.random.default_rng(1)
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(" ".join(draw.choice(WORDS, draw.integers(3, 20))) for _ in range(150)))
    return path


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """A folder as sentence-transformers reads it."""
    path = tmp_path_factory.mktemp("model") / "sentences"
    encoder("embedding").save_pretrained(path)
    tokenizer().save_pretrained(path)
    write_sentences(path, length=12)
    return path


class Lab:
    """A model on its way through the compiler, up to where it is lowered."""

    def __init__(self, pretrained, text, recipe=RECIPE):
        self.pretrained, self.recipe = pretrained, recipe
        self.traced = trace(pretrained)
        canonicalise(self.traced.program)
        self.parts = partition(self.traced.program)
        program = self.traced.program
        self.dense = {**program.constants, **{k: v.detach() for k, v in program.state_dict.items()}}
        self.output = output_of(self.traced, pretrained)
        if pretrained.inputs[0] == "input_ids":
            texts = read_texts(text, tokenizer(), tokens=1200, length=16)
            self.batches = text_batches(self.traced, pretrained, recipe, texts)
        else:
            generator = torch.Generator().manual_seed(1)
            self.batches = [Batch((torch.randn(4, 3, 32, 32, generator=generator),), None) for _ in range(16)]

    def run(self, folder=None, progress=lambda *told: None):
        params = dict(self.dense)
        done = sparsify(
            self.parts,
            params,
            self.recipe,
            self.batches,
            output=self.output,
            checkpoint=folder,
            progress=progress,
        )
        return params, done


LIKE_OTHERS = ("tokens", "picture states", "labels")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name in LIKE_OTHERS else ()) for name in WANTED]
)
def test_every_encoder_is_trained_by_what_it_is_for(name, text):
    lab = Lab(describe(encoder(name)), text)
    assert lab.output == WANTED[name]
    params, done = lab.run()
    (report,) = done.distilled
    assert report.after < report.before
    changed = [key for key in params if params[key] is not lab.dense[key]]
    assert all((params[key].reshape(-1, 4) != 0).sum(1).max() <= 2 for key in changed if key.endswith("value.weight"))


def test_a_folder_of_sentence_transformers_is_trained_by_its_embeddings(sentences, text):
    lab = Lab(load(str(sentences)), text)
    assert lab.output == Pooled("mean", normalise=True)
    balanced = replace(lab.recipe, distil=None)
    best, done = lab.run()
    lab.recipe = balanced
    before, _ = lab.run()
    (report,) = done.distilled
    assert report.after < 0.9 * report.before
    assert cosine(lab, best) > cosine(lab, before)


def cosine(lab, params):
    """Mean cosine of the texts' embeddings to the dense model's, pooled by hand, text by text and without padding."""
    found = []
    for batch in lab.batches:
        for ids, mask in zip(batch.inputs[0], batch.token_mask, strict=True):
            own = (
                ids[mask][None],
                torch.ones(1, int(mask.sum()), dtype=torch.long),
                torch.zeros(1, int(mask.sum())).long(),
            )
            one, other = (run_model(lab.parts, own, each, run_part)[0].double().mean(0) for each in (params, lab.dense))
            found.append(float(one @ other / (one.norm() * other.norm())))
    return sum(found) / len(found)


class Stopped(Exception):
    pass


def test_going_on_gives_what_was_not_stopped(sentences, text, tmp_path):
    moving = replace(RECIPE.distil, moves=Moves(2, 0.05))
    lab = Lab(load(str(sentences)), text, replace(RECIPE, distil=moving))
    whole, done = lab.run()
    (report,) = done.distilled
    assert report.moved > 0
    steps = []

    def stop(stage, count, of):
        steps.append((stage, count, of))
        if stage == "distilling" and count > of / 3:
            raise Stopped

    with pytest.raises(Stopped):
        lab.run(tmp_path / "kept", stop)
    again, other = lab.run(tmp_path / "kept")
    assert other.distilled == done.distilled
    assert all(torch.equal(again[key], whole[key]) for key in whole)


def test_best_of_a_folder_is_written_back_and_finds_the_same(sentences, text, tmp_path, capsys):
    out = tmp_path / "out"
    flags = ["--nm", "2:4", "--effort", "best", "--calibration", str(text), "--samples", "20", "--seq-len", "32"]
    assert main([str(sentences), *flags, "-o", f"{out}/"]) == 0
    assert (
        "windows shortened from 32 to 12 tokens: that is what the folder says that a text has"
        in capsys.readouterr().err
    )
    report = json.loads((out / "report.json").read_text())
    assert report["distilled"][0]["after"] < report["distilled"][0]["before"]
    assert json.loads((out / "1_Pooling" / "config.json").read_text()) == {"pooling_mode_mean_tokens": True}
    texts = text.read_text().split("\n\n")[50:]
    session, model = open_session(out), load(str(sentences))
    words = tokenizer()
    found = embed(Embedder(onnx_hidden(session), [x.name for x in session.get_inputs()], words), texts)
    dense = embed(Embedder(torch_hidden(model.model), model.inputs, words), texts)
    assert (found * dense).sum(1).mean() > 0.8
