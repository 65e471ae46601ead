"""Compile every GPU kernel for every architecture and tabulate registers, shared memory and spills.

    python -P tools/cuda_resources.py --out docs/cuda_resources.md

Fails (exit 1) if a kernel spills registers on an architecture, and if nvcc fails. nvcc is looked for in CUDA_HOME, on
the path, in /usr/local/cuda and in the wheels that `make cuda` installs where there is none.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
ARCHITECTURES = (80, 86, 87, 89, 90, 100, 110, 120)
OLDEST = (13, 0)
"""The release of nvcc that knows them all."""

WHEEL = ROOT / "build/nvcc/nvidia/cu13"
"""Where ``pip install --target build/nvcc nvidia-cuda-nvcc ...`` puts the toolkit."""

ENTRY = re.compile(r"Compiling entry function '(\w+)' for 'sm_(\d+)a?'")
SPILLS = re.compile(r"(\d+) bytes spill stores, (\d+) bytes spill loads")
USED = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")


@dataclass(frozen=True)
class Usage:
    """What ptxas says of one kernel on one architecture.

    Attributes:
        kernel: mangled name.
        architecture: 80 for sm_80.
        registers: of a thread.
        shared: bytes of static shared memory of a block.
        spilled: bytes of spill stores and loads.
    """

    kernel: str
    architecture: int
    registers: int
    shared: int
    spilled: int


def parse(text: str) -> list[Usage]:
    """The kernels in what ``nvcc -Xptxas -v`` prints.

    Raises:
        ValueError: a kernel has no line with its registers or its spills.
    """
    parts = re.split(r"(?=Compiling entry function )", text)[1:]
    found = []
    for part in parts:
        entry, spills, used = ENTRY.match(part), SPILLS.search(part), USED.search(part)
        if not (entry and spills and used):
            raise ValueError(f"ptxas said nothing about registers or spills: {part[:200]!r}")
        shared = SHARED.search(part)
        spilled = int(spills[1]) + int(spills[2])
        found.append(Usage(entry[1], int(entry[2]), int(used[1]), int(shared[1]) if shared else 0, spilled))
    return found


def short(demangled: str) -> str:
    """``void sparsify_cuda::f<__half, (int)2, true>(float*)`` as ``f<half, 2, true>``."""
    name = demangled.removeprefix("void ").replace("sparsify_cuda::", "")
    name = name[: name.index("(", name.index(">") if "<" in name else 0)]
    return name.replace("__nv_bfloat16", "bf16").replace("__half", "half").replace("(int)", "").replace("(bool)", "")


def demangle(names: Iterable[str]) -> dict[str, str]:
    """Readable names by mangled ones; binutils' c++filt does it."""
    every = sorted(set(names))
    done = subprocess.run(["c++filt"], input="\n".join(every), capture_output=True, text=True, check=True)
    return {name: short(plain) for name, plain in zip(every, done.stdout.splitlines(), strict=True)}


def find_nvcc() -> Path:
    """The first nvcc there is.

    Raises:
        FileNotFoundError: there is none.
    """
    homes = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    on_path = shutil.which("nvcc")
    places = [Path(home) / "bin/nvcc" for home in homes if home]
    places += [Path(on_path)] if on_path else []
    places += [Path("/usr/local/cuda/bin/nvcc"), WHEEL / "bin/nvcc"]
    for place in places:
        if place.is_file():
            return place
    raise FileNotFoundError("no nvcc in CUDA_HOME, on the path, in /usr/local/cuda or in build/nvcc")


def compile_one(nvcc: Path, source: Path, objects: Path) -> list[Usage]:
    """Compile one file for all architectures.

    Raises:
        RuntimeError: nvcc failed; with what it said.
    """
    targets = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in ARCHITECTURES]
    out = objects / f"{source.stem}.o"
    command = [str(nvcc), "-std=c++17", "-Xptxas", "-v", *targets, "-c", str(source), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"nvcc failed on {source}:\n{done.stdout}{done.stderr}")
    return parse(done.stderr)


def table(usages: list[Usage], version: str) -> str:
    """The page: one line a kernel, registers by architecture."""
    names = demangle(usage.kernel for usage in usages)
    lines = [
        "# Registers and shared memory of the GPU kernels",
        "",
        "Written by `make cuda` (tools/cuda_resources.py) from what ptxas says; nothing here was run.",
        f"Compiler: {version}. Spills: {sum(usage.spilled for usage in usages)} bytes in all.",
        "",
        "| kernel | shared memory | " + " | ".join(f"sm_{a}" for a in ARCHITECTURES) + " |",
        "|---|---|" + "---|" * len(ARCHITECTURES),
    ]
    by_kernel: dict[str, dict[int, Usage]] = {}
    for usage in usages:
        by_kernel.setdefault(names[usage.kernel], {})[usage.architecture] = usage
    for name, by_architecture in sorted(by_kernel.items()):
        shared = max(usage.shared for usage in by_architecture.values())
        cells = [_cell(by_architecture[a]) if a in by_architecture else "-" for a in ARCHITECTURES]
        lines.append(f"| `{name}` | {shared} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(usage: Usage) -> str:
    return f"{usage.registers}, {usage.spilled} B spilled" if usage.spilled else str(usage.registers)


def main(arguments: list[str] | None = None) -> int:
    """Compile, write the page, and say whether anything spills."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the page to write; standard output if not given")
    parser.add_argument("--jobs", type=int, default=2, help="files compiled at a time")
    parser.add_argument("--find", action="store_true", help="only print where nvcc is")
    args = parser.parse_args(arguments)
    try:
        nvcc = find_nvcc()
    except FileNotFoundError as error:
        print(error, file=sys.stderr)
        return 1
    if args.find:
        print(nvcc)
        return 0
    said = subprocess.run([str(nvcc), "--version"], capture_output=True, text=True, check=True).stdout
    release = re.search(r"release (\d+)\.(\d+), V([\d.]+)", said)
    if release is None or (int(release[1]), int(release[2])) < OLDEST:
        told = f"release {release[1]}.{release[2]}" if release else "an unknown release"
        print(f"want nvcc {OLDEST[0]}.{OLDEST[1]} or newer, which knows sm_110; {nvcc} is {told}", file=sys.stderr)
        return 1
    objects = ROOT / "build/cuda"
    objects.mkdir(parents=True, exist_ok=True)
    sources = sorted((ROOT / "cuda").glob("*.cu"))
    begin = time.monotonic()
    with ThreadPoolExecutor(args.jobs) as pool:
        usages = [u for found in pool.map(lambda s: compile_one(nvcc, s, objects), sources) for u in found]
    print(f"{len(sources)} files, {len(usages)} kernels in {time.monotonic() - begin:.0f} s", file=sys.stderr)
    page = table(usages, f"nvcc {release[3]}")
    if args.out:
        args.out.write_text(page)
    else:
        print(page, end="")
    spilling = [u for u in usages if u.spilled]
    names = demangle(u.kernel for u in spilling)
    for usage in spilling:
        print(f"{names[usage.kernel]} spills {usage.spilled} bytes on sm_{usage.architecture}", file=sys.stderr)
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
