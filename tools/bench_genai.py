"""How fast whole exported models decode against onnxruntime-genai's own build of the same model.

    python3.11 -m venv /tmp/genai-venv && /tmp/genai-venv/bin/pip install onnxruntime-genai==0.18.0
    python -P tools/bench_genai.py SPARSE.onnx --genai /tmp/genai-venv/bin/python --against GENAI_FOLDER --head int4

GENAI_FOLDER is what its model builder writes, which needs torch, transformers and onnx_ir beside it, and a Hugging Face
folder:

    python -m onnxruntime_genai.models.builder -i HF_FOLDER -o GENAI_FOLDER -p int4 -e cpu -c CACHE --extra_options
        hf_token=false nodes_to_exclude=/lm_head/MatMul     # the last one keeps its head in fp32

Ours run in this process through ONNX Runtime, each token chosen by its largest logit; genai's model runs in a process
of its own through its own loop, which chooses as well. All run in turns, with a pause between two for their threads to
come to rest. A row is the median over the rounds; so is a speed-up, of the ratios within a round.

What a head is stored as is read from the file. Ours leave it dense, in fp32. --head int4 adds each of them once more
with the head stored as genai's int4 is (MatMulNBits, blocks of 32, accuracy level 4), for timing only. A folder of
ours runs in genai too: name it in --against as well.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper
from rich.console import Console
from rich.table import Table
from sparsify_export.passes.onnx.protos import data_files
from sparsify_export.runtime.session import CausalSession, model_file, open_session

WORKER = str(Path(__file__).with_name("kernel_bench") / "genai_worker.py")
BLOCK = 32
REST = 0.05  # seconds; the threads of a session go on spinning for a while
Run = Callable[[int, int], float]


def head(graph: onnx.GraphProto) -> onnx.NodeProto:
    """The node that makes the logits."""
    return next(node for node in graph.node if "logits" in node.output)


def head_name(path: Path) -> str:
    """What the head is stored as."""
    node = head(onnx.load(str(path), load_external_data=False).graph)
    if node.op_type != "MatMulNBits":
        return "fp32" if node.op_type == "MatMul" else node.op_type
    sizes = {attribute.name: attribute.i for attribute in node.attribute}
    return f"int{sizes['bits']}, blocks of {sizes['block_size']}"


def int4_blocks(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """``weight [N, K]`` as MatMulNBits holds it: codes ``[N, K / 32, 16]``, two a byte, and scales ``[N, K / 32]``."""
    blocks = weight.reshape(len(weight), -1, BLOCK)
    scales = np.abs(blocks).max(axis=2) / np.float32(7)
    codes = np.rint(blocks / np.where(scales > 0, scales, 1)[..., None]).astype(np.int8) + 8
    codes = codes.astype(np.uint8)
    return codes[..., ::2] | codes[..., 1::2] << 4, scales


def with_int4_head(path: Path, folder: Path) -> Path:
    """A copy of the file whose head is a MatMulNBits of 4 bits."""
    proto = onnx.load(str(path), load_external_data=False)
    graph, node = proto.graph, head(proto.graph)
    makers = {output: maker for maker in graph.node for output in maker.output}
    name = node.input[1]
    transposed = name in makers and makers[name].op_type == "Transpose"
    name = makers[name].input[0] if transposed else name
    stored = next(tensor for tensor in graph.initializer if tensor.name == name)
    weight = numpy_helper.to_array(stored, base_dir=str(path.parent)).astype(np.float32)
    codes, scales = int4_blocks(weight if transposed else np.ascontiguousarray(weight.T))
    graph.initializer.extend(
        [numpy_helper.from_array(codes, "head_codes"), numpy_helper.from_array(scales, "head_scales")]
    )
    sizes = {"K": scales.shape[1] * BLOCK, "N": len(scales), "bits": 4, "block_size": BLOCK, "accuracy_level": 4}
    inputs = [node.input[0], "head_codes", "head_scales"]
    node.CopyFrom(helper.make_node("MatMulNBits", inputs, ["logits"], domain="com.microsoft", **sizes))
    if all(opset.domain != "com.microsoft" for opset in proto.opset_import):
        proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    out = folder / path.name
    for data in data_files(path):
        shutil.copy(data, folder)
    onnx.save(proto, str(out))
    return out


class Ours:
    """A file of ours in ONNX Runtime."""

    def __init__(self, path: Path, threads: int) -> None:
        self.model = CausalSession(open_session(path, threads=threads))
        self.pasts = {}

    def __call__(self, cached: int, steps: int) -> float:
        """Milliseconds of a decoded token behind ``cached``, or with 0 steps of a prompt of ``cached``."""
        rng = np.random.default_rng(0)
        if not steps:
            ids, mask = rng.integers(3, self.model.vocabulary, (1, cached)), np.ones((1, cached), np.int64)
            begin = time.perf_counter()
            self.model.step(ids, mask, self.model.empty_past(1))
            return 1e3 * (time.perf_counter() - begin)
        past = self.pasts.setdefault(cached, self.model.random_past(1, cached))
        ids, times = np.array([[5]]), []
        for length in range(cached + 1, cached + steps + 1):
            begin = time.perf_counter()
            logits, past = self.model.step(ids, np.ones((1, length), np.int64), past)
            ids = logits[:, -1:].argmax(axis=-1)
            times.append(1e3 * (time.perf_counter() - begin))
        return statistics.median(times)


class Genai:
    """A model of onnxruntime-genai in a process of its own."""

    def __init__(self, python: str, folder: Path, threads: int) -> None:
        line = [python, WORKER, str(folder), str(threads)]
        self.process = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.version = self.answer()["version"]

    def answer(self) -> object:
        """The next line that it prints."""
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"onnxruntime-genai ended with exit code {self.process.wait()}")
        return json.loads(line)

    def __call__(self, cached: int, steps: int) -> float:
        """As ``Ours``."""
        self.process.stdin.write(f"{cached} {steps}\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End the process."""
        self.process.stdin.close()
        self.process.wait()


def measure(runs: dict[str, Run], cached: int, steps: int, rounds: int) -> dict[str, list[float]]:
    """Every contestant once a round, in turns, after one round that does not count."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        for name, run in runs.items():
            taken = run(cached, steps)
            time.sleep(REST)
            if number:
                times[name].append(taken)
    return times


def parser() -> argparse.ArgumentParser:
    """The options."""
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = made.add_argument
    add("ours", nargs="+", type=Path, help="files or folders that sparsify-export wrote")
    add("--genai", required=True, metavar="PYTHON", help="an interpreter that has onnxruntime-genai")
    add("--against", required=True, nargs="+", type=Path, metavar="FOLDER", help="what its model builder wrote")
    add("--head", choices=["fp32", "int4"], default="fp32", help="int4 adds ours with the head of genai's int4")
    add("--cached", nargs="*", type=int, default=[64, 1024], help="decode behind so many tokens (default 64 1024)")
    add("--prefill", nargs="*", type=int, default=[512], help="prompts of so many tokens (default 512)")
    add("--steps", type=int, default=16, help="tokens decoded in a run (default 16)")
    add("--rounds", type=int, default=9, help="default 9")
    add("--threads", type=int, default=2, help="of every contestant (default 2)")
    add("--json", action="store_true", help="print JSON")
    return made


def main() -> None:
    """Measure and print."""
    args = parser().parse_args()
    work = {f"decode {cached}": (cached, args.steps) for cached in args.cached}
    work |= {f"prefill {tokens}": (tokens, 0) for tokens in args.prefill}
    with tempfile.TemporaryDirectory() as folder:
        files = {str(path): model_file(path) for path in args.ours}
        if args.head == "int4":
            for number, (name, path) in enumerate(list(files.items())):
                own = Path(folder) / str(number)
                own.mkdir()
                files[f"{name} +head"] = with_int4_head(path, own)
        ours: dict[str, Run] = {name: Ours(path, args.threads) for name, path in files.items()}
        heads = {name: head_name(path) for name, path in files.items()}
        theirs = {str(path): Genai(args.genai, path, args.threads) for path in args.against}
        heads |= {str(path): head_name(path / "model.onnx") for path in args.against}
        try:
            with Console(stderr=True).status("measuring"):
                times = {name: measure(ours | theirs, *what, args.rounds) for name, what in work.items()}
        finally:
            for worker in theirs.values():
                worker.close()
    medians = {c: {w: statistics.median(times[w][c]) for w in work} for c in heads}
    ratios = {
        f"{mine} against {other}": {
            w: statistics.median(b / a for a, b in zip(times[w][mine], times[w][other], strict=True)) for w in work
        }
        for mine in ours
        for other in theirs
    }
    if args.json:
        json.dump({"threads": args.threads, "heads": heads, "ms": medians, "speedup": ratios}, sys.stdout, indent=1)
        return
    version = next(iter(theirs.values())).version
    table = Table("model", "head", *(f"{w}, ms" for w in work), title=f"genai {version}, {args.threads} threads")
    for name, row in medians.items():
        table.add_row(name, heads[name], *(f"{row[w]:.2f}" for w in work))
    pairs = Table("speed-up", *work)
    for name, row in ratios.items():
        pairs.add_row(name, *(f"{row[w]:.2f}x" for w in work))
    for shown in (table, pairs):
        Console().print(shown)


if __name__ == "__main__":
    main()
