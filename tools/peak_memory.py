"""Run sparsify-export and print, stage by stage, the most memory that it had.

    python tools/peak_memory.py MODEL --nm 2:4 --effort fast -o out.onnx

Two numbers a stage, read 50 times a second from /proc/PID/status: RssAnon, what the process needs for itself, and
RssFile, pages of mapped files, which the kernel takes back where memory is short.
"""

import subprocess
import sys
import time
from pathlib import Path

INTERVAL = 0.02
BETWEEN = "between stages"
RUN = """
import sys, time
from contextlib import contextmanager
from sparsify_export import stages
plain = stages.Stages.run
@contextmanager
def told(self, name):
    with open(sys.argv[1], "a") as out:
        out.write(f"{time.monotonic()} {name}\\n")
    with plain(self, name):
        yield
    with open(sys.argv[1], "a") as out:
        out.write(f"{time.monotonic()} BETWEEN\\n")
stages.Stages.run = told
from sparsify_export.cli import main
sys.exit(main(sys.argv[2:]))
""".replace("BETWEEN", BETWEEN)


def sample(pid: int) -> tuple[int, int] | None:
    """RssAnon and RssFile in bytes; None once the process is gone."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError:
        return None
    found = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines) if "Rss" in name}
    return (found["RssAnon"] * 1024, found["RssFile"] * 1024) if found else None


def main() -> int:
    """Run it; the table goes to the standard output, behind what the command prints."""
    marks = Path(f"/tmp/peak_memory.{time.monotonic_ns()}")
    marks.touch()
    began = time.monotonic()
    child = subprocess.Popen([sys.executable, "-P", "-c", RUN, str(marks), *sys.argv[1:]])
    seen: list[tuple[float, int, int]] = []
    while child.poll() is None:
        if (found := sample(child.pid)) is not None:
            seen.append((time.monotonic(), *found))
        time.sleep(INTERVAL)
    ended = time.monotonic()
    told = (line.partition(" ") for line in marks.read_text(encoding="utf-8").splitlines())
    told = (line.partition(" ") for line in marks.read_text(encoding="utf-8").splitlines())
    stages = [(began, "start"), *((float(when), name) for when, _, name in told)]
    marks.unlink()
    sys.stdout.write(f"{'stage':20} {'seconds':>8} {'anonymous':>10} {'files':>10}\n")
    for (start, name), (end, _) in zip(stages, [*stages[1:], (ended, "")], strict=True):
        own = [(anon, file) for when, anon, file in seen if start <= when < end]
        if own:
            anon, file = (max(column) / 1e6 for column in zip(*own, strict=True))
            sys.stdout.write(f"{name:20} {end - start:8.1f} {anon:8.0f}MB {file:8.0f}MB\n")
    anon, file = (max(column) / 1e6 for column in zip(*((a, f) for _, a, f in seen), strict=True))
    sys.stdout.write(f"{'the most':20} {ended - began:8.1f} {anon:8.0f}MB {file:8.0f}MB\n")
    return child.returncode


if __name__ == "__main__":
    sys.exit(main())
