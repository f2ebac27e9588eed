"""The errors of t5slim, raised at the call that caused them and before anything expensive.

Each also derives from the built-in that callers would catch without knowing t5slim: `ValueError`
for a wrong input, `OSError` for a Hub that can't be reached.
"""


class T5SlimError(Exception):
    """Base of every error that t5slim raises on purpose."""


class ConfigError(T5SlimError, ValueError):
    """An unknown setting or config key, a value out of range, or an unusable output folder."""


class CheckpointError(T5SlimError, ValueError):
    """A checkpoint can't be used: missing or unexpected tensors, NaN, truncated, or a pickle."""


class HubAccessError(T5SlimError, OSError):
    """A Hub repository, or a local file, doesn't exist, is gated, or can't be read or written."""


class NoT5SlotError(T5SlimError, ValueError):
    """The pipeline has no T5 text encoder that a student could replace."""


class IncompatibleStudentError(T5SlimError, ValueError):
    """The student doesn't fit the pipeline: another vocabulary, or another output width."""


class PatchError(T5SlimError, ValueError):
    """The pipeline can't be patched, or unpatched, in its present state."""


class DistillError(T5SlimError, ValueError):
    """A distillation can't start with these arguments, or can't continue."""
