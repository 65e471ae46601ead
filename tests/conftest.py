"""Settings for all tests."""

import hypothesis

# The same examples on every run; and no deadline, since a busy machine is not a bug.
hypothesis.settings.register_profile("sparsify", deadline=None, derandomize=True)
hypothesis.settings.load_profile("sparsify")
