"""The exceptions of ckptfuse. Every message says what, where, why and what to do next."""


class CkptfuseError(Exception):
    """Base of all expected failures; the command line prints it without a traceback."""

    exit_status = 1


class ConfigurationError(CkptfuseError):
    """Parameters, arguments or credentials that a person has to correct."""

    exit_status = 2


class StoreError(CkptfuseError):
    """A bucket or folder that cannot be read or written."""


class MissingFile(StoreError):
    """A file that is not (or no longer) in its store."""


class AccessDenied(StoreError):
    """A file or folder that this user may not read; others beside it may be readable."""


class IncompleteCheckpoint(CkptfuseError):
    """A checkpoint that is still being written; it counts once it is whole."""


class DamagedCheckpoint(CkptfuseError):
    """A checkpoint whose bytes cannot be a model of this trajectory."""


class ChangedCheckpoint(CkptfuseError):
    """A checkpoint whose files changed while they were read; the next look reads it afresh."""


class ConversionError(CkptfuseError):
    """A converter of the team's own that fails: it is to blame as well as the checkpoint may be."""


class NonFiniteValues(DamagedCheckpoint):
    """NaN or Inf among weights or losses. ``checkpoint`` names the culprit."""

    def __init__(self, message: str, *, checkpoint: str) -> None:
        super().__init__(message)
        self.checkpoint = checkpoint


class MismatchedCheckpoints(CkptfuseError):
    """Inputs of a merge that differ in tensor names, shapes, dtypes or architecture."""


class CorpusError(ConfigurationError):
    """Target text that is missing, empty or unusable with the tokenizer."""


class RuleError(ConfigurationError):
    """A weight rule that is unknown, misconfigured, or whose answer is not on the simplex."""


class RecordError(CkptfuseError):
    """A record that does not say what its schema promises."""


class JobError(CkptfuseError):
    """A scoring job that ended without its results."""


class PublicationError(CkptfuseError):
    """Git, DVC or the registry refused a step of publication; the next run tries again."""


def in_a_line(error: Exception) -> str:
    """Another's error by its kind and first line: compilers and drivers write pages."""
    first_line = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {first_line}"
