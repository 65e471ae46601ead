"""The report as one HTML file: what it says, that names are escaped, and that it loads nothing."""

import json
from html.parser import HTMLParser

import pytest
from sparsify_export.cli import main

EVIL = '<script>alert("x")</script>'


def report_json(**changed):
    """A report of one block of two linears and a head."""
    linear = {
        "shape": [8, 4],
        "pattern": "2:4",
        "op": "linear_nm",
        "reason": "",
        "sparsity": 0.5,
        "retained_after": 0.75,
        "error_after": 0.125,
        "stored_bytes": 68,
        "dense_bytes": 128,
        "refused": "",
    }
    dense = {"pattern": None, "op": "MatMul", "reason": "outside the repeated layers", "sparsity": None}
    head = {**linear, **dense, "path": EVIL, "retained_after": None, "error_after": None, "stored_bytes": 128}
    times = {"p50": 2.0, "p90": 3.0}
    return {
        "written_by": "sparsify-export",
        "files": [],
        "source": EVIL,
        "settings": {"pattern": "2:4", "skip": []},
        "linears": [
            {**linear, "path": "h.0.up"},
            {**linear, "path": "h.0.down", "shape": [4, 24], "retained_after": 0.95},
            head,
        ],
        "blocks": [{"path": "h.0", "error": 0.25, "folds": [], "tuned": []}],
        "verified": [{"how": "kernels", "error": 1e-6, "allowed": 1e-5}],
        "evaluation": None,
        "latency": [
            {"name": "decode 64", "model": times, "against": {"p50": 4.0, "p90": 5.0}, "ratio": 2.0, "runs": 9}
        ],
        "stages": [{"name": "load", "seconds": 1.5, "peak_bytes": 1000000}],
        "dense_linear_bytes": 256,
        "stored_linear_bytes": 136,
        "file_bytes": 1000,
        "given_bytes": None,
        "engine": None,
        **changed,
    }


HALF = {"path": "a", "reason": "", "stored_bytes": 1, "dense_bytes": 2}  # which lacks its shape


class Page(HTMLParser):
    """The tags of a page with their attributes, and its text."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data.strip())


def page_of(tmp_path, *reports):
    """The page that the command writes of these reports."""
    for number, report in enumerate(reports):
        (tmp_path / f"{number}.json").write_text(json.dumps(report))
    out = tmp_path / "r.html"
    assert main(["report", *(str(tmp_path / f"{n}.json") for n in range(len(reports))), "-o", str(out)]) == 0
    return Page(out.read_text()), out.read_text()


def test_a_page_holds_the_figures_and_escapes_what_it_is_given(tmp_path):
    page, text = page_of(tmp_path, report_json())
    assert (
        "Smaller and faster; linears take 0.531 of their dense fp32 bytes; 2.00x to 2.00x as fast as the same file "
        "without our kernels." in page.texts
    )
    bars = [attrs["width"] for tag, attrs in page.tags if tag == "rect"]
    assert len(bars) == 6  # error, score, zeros and bytes of a block; two latencies
    assert bars[-2:] == ["50.00", "100.00"]
    assert "0.900" in page.texts  # the score kept: 32 weights with 0.75, 96 with 0.95
    assert EVIL not in text
    assert page.texts.count(EVIL) == 2  # as text: the model's name and the head's path
    assert [tag for tag, _ in page.tags].count("script") == 1


def test_a_page_asks_for_nothing(tmp_path):
    page, text = page_of(tmp_path, report_json())
    assert not {"src", "href", "srcset", "action", "data"} & {name for _, attrs in page.tags for name in attrs}
    assert "url(" not in text
    assert "@import" not in text
    assert any(attrs.get("content", "").startswith("default-src 'none'") for _, attrs in page.tags)


def test_two_reports_stand_below_each_other(tmp_path):
    slow = [{"name": "decode 64", "model": {"p50": 4.0}, "against": {"p50": 4.0}, "ratio": 1.0, "runs": 9}]
    scores = {"dense": {"perplexity": 20.0}, "result": {"perplexity": 30.0}, "dense_answers": {}, "result_answers": {}}
    other = report_json(source="b", latency=slow, evaluation=scores, stored_linear_bytes=256)
    page, _ = page_of(tmp_path, report_json(), other)
    assert [tag for tag, _ in page.tags].count("section") == 2
    assert any(
        text.startswith("No gain; linears take 1.000") and text.endswith("perplexity 30.00, dense 20.00.")
        for text in page.texts
    )


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("[]", "is not a report of this version"),
        ("{}", "is not a report of this version"),
        ('{"written_by": "another"}', "was not written by sparsify-export"),
        ("{", "is not JSON"),
        (json.dumps(report_json(linears=[HALF], blocks=[])), "is not one of this"),
        (json.dumps(report_json(linears=[{"dense_bytes": 0, "stored_bytes": 0}])), "is not a report of this version"),
    ],
)
def test_a_file_that_is_no_report_is_refused(text, why, tmp_path, capsys):
    (tmp_path / "m.onnx.report.json").write_text(text)
    assert main(["report", str(tmp_path / "m.onnx"), "-o", str(tmp_path / "r.html")]) == 2
    assert why in capsys.readouterr().err
    assert not (tmp_path / "r.html").exists()


def test_what_is_there_stays(tmp_path, capsys):
    (tmp_path / "report.json").write_text(json.dumps(report_json()))
    (tmp_path / "r.html").write_text("mine")
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "r.html")]) == 2
    assert (tmp_path / "r.html").read_text() == "mine"
    assert main(["report", str(tmp_path), "-o", str(tmp_path / "r.html"), "--overwrite"]) == 0
    assert main(["report", str(tmp_path / "none"), "-o", str(tmp_path / "s.html")]) == 2
    assert "has no report" in capsys.readouterr().err
