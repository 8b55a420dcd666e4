"""The errors a user can cause. Each message is one line: what is wrong, where, and what to do.

    ChartlmError
    ├── ConfigError    a recipe, an override, a verb
    ├── DataError      notes, tables, shards, tokenizers
    ├── StorageError   files and URLs: missing, unreadable, no space left
    ├── TrainingError  a run that must not go on (a loss that is not finite, a damaged checkpoint)
    ├── ClusterError   Ray, a node or too many workers died; the same command goes on
    └── Preempted      told to stop (SIGTERM): all is saved, the same command goes on

The command line prints the message and exits with `exit_code`; it shows no traceback for these. Messages carry
identifiers and counts, never text of a note.
"""


class ChartlmError(Exception):
    """Base of every error that is reported to the user as one line."""

    exit_code = 2


class ConfigError(ChartlmError):
    """A recipe, an override or a verb that cannot be understood."""


class DataError(ChartlmError):
    """Input that is not what it should be."""


class StorageError(ChartlmError):
    """A file or URL that cannot be read or written."""


class TrainingError(ChartlmError):
    """A training run that must stop before it does damage."""

    exit_code = 3


class ClusterError(ChartlmError):
    """Machines that failed under a job which is itself in order."""

    exit_code = 3


class Preempted(ChartlmError):
    """Work that was told to stop and saved all it had; the code asks a scheduler to start it again (EX_TEMPFAIL)."""

    exit_code = 75
