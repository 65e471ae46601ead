"""What --eval tells while it runs."""

from sparsify_export.evaluation import evaluate_torch
from sparsify_export.passes.frontend.load import load
from sparsify_export.settings import Calibration, Console, Settings
from sparsify_export.stages import Stages


def test_windows_and_problems_are_counted(folder, text):
    told = []
    settings = Settings(None, Calibration(), evaluate=text, window=32, windows=3)
    stages = Stages()
    found = evaluate_torch(load(str(folder)), settings, stages, Console(progress=lambda *step: told.append(step)))
    assert found is not None
    windows = [("evaluating", done, 3) for done in (1, 2, 3)]
    problems = told[len(windows) + 1 :]
    assert told[: len(windows) + 1] == [("evaluating the dense model", 0, 0), *windows]
    assert problems == [("exact answers", done, len(problems)) for done in range(1, len(problems) + 1)]
    assert len(problems) > 100
    assert [stage.name for stage in stages.done] == ["evaluate dense"]
