"""Errors that a user can cause, and the exit code of each.

A message says what was found, where, and what to do. Only the command line turns one into a line and an exit code.
"""

EXIT_COMPLETE = 0
EXIT_ERROR = 1
EXIT_USAGE = 2
EXIT_SOME_CLIPS_FAILED = 3
EXIT_INTERRUPTED = 130


class VivitError(Exception):
    """Base of every error that the command line prints as one line."""

    exit_code = EXIT_ERROR


class ConfigError(VivitError):
    """An option or setting has a value that cannot work."""

    exit_code = EXIT_USAGE


class DataError(VivitError):
    """Annotation files, videos or a manifest are missing or wrong."""


class WeightsError(VivitError):
    """Weights are missing, damaged, or do not fit the model."""


class CacheError(VivitError):
    """A feature cache is missing, damaged or in use."""


class StaleCacheError(CacheError):
    """A feature cache was made with other settings than those asked for."""


class IncompleteCacheError(CacheError):
    """A feature cache lacks blocks that the reader needs."""


class CheckpointError(VivitError):
    """A run folder or checkpoint is missing, damaged, or belongs to other settings."""


class StorageError(VivitError):
    """A file system or object store refused a read or write: full, read-only, no permission, out of reach."""


class BlockError(VivitError):
    """Blocks of a feature cache could not be computed, or the workers that compute them are gone; the others stay."""


class InterruptedRunError(VivitError):
    """The user stopped the run; what was committed stays."""

    exit_code = EXIT_INTERRUPTED
