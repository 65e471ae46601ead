"""The ways a command ends early, besides a bug."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message is one sentence that says what was got and wanted."""


class VerificationError(RuntimeError):
    """What was compiled does not compute what the model computes; the message names the pass."""


class NotBuiltError(RuntimeError):
    """An engine can be neither built nor run on this machine; the message is one sentence that says what is missing."""
