"""Which machine figures were measured on: kernels that win on one lose on another."""

import re
from pathlib import Path

import onnxruntime
from sparsify_export import _native
from sparsify_export.runtime.machine import this_machine

# What our kernels and ONNX Runtime's choose by.
FEATURES = ("avx2", "avx_vnni", "avx512f", "avx512_vbmi2", "avx512_vnni", "avx512_bf16", "amx_bf16", "amx_int8")
NUMBERS = ("cpu family", "model")


def about(threads: int) -> dict[str, object]:
    """The processor, what it has of ``FEATURES``, its last level of cache, and what was run on it."""
    said = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    flags = set(said.split())
    # A virtual machine often names the maker and no more.
    numbers = [
        f"{key.removeprefix('cpu ')} {match[1]}"
        for key in NUMBERS
        if (match := re.search(rf"^{key}\s*:\s*(\d+)$", said, re.M))
    ]
    return {
        "processor": ", ".join([str(this_machine().key["processor"]), *numbers]),
        "features": [name for name in FEATURES if name in flags],
        "cache_mb": last_level_cache() / 1e6,
        "isa": _native.isa(),
        "threads": threads,
        "onnxruntime": onnxruntime.__version__,
    }


def last_level_cache() -> int:
    """Bytes of the largest cache of the first core; 0 where the system does not say."""
    sizes = [0]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        if found := re.fullmatch(r"(\d+)([KM]?)", file.read_text(encoding="ascii").strip()):
            sizes.append(int(found[1]) * {"": 1, "K": 1 << 10, "M": 1 << 20}[found[2]])
    return max(sizes)
