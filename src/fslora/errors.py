"""Errors that teach: every message names the thing, the value it had and what to do about it."""

from __future__ import annotations


class FsloraError(Exception):
    """Base of every error that this package raises on purpose."""


class ConfigError(FsloraError, ValueError):
    """The experiment cannot be run as it is written."""


class DataError(FsloraError, ValueError):
    """A data source, or the partition of it, cannot be used."""


class ModelError(FsloraError, ValueError):
    """A base model cannot be loaded, verified or adapted."""


class TrainingError(FsloraError, RuntimeError):
    """Training cannot go on; what was computed before is still in the run folder."""


class WireError(FsloraError, ValueError):
    """What came over the wire is not what was agreed on; nothing of it may be used."""


class ArtifactError(FsloraError, OSError):
    """A run folder, checkpoint or adapter is missing, damaged or cannot be written."""
