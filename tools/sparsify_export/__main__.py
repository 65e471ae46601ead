"""``python -m sparsify_export`` is the command ``sparsify-export``."""

import sys

from .cli import main

sys.exit(main())
