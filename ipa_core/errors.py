"""The exception family: one base class, each member also the built-in a caller would expect."""

from __future__ import annotations


class IPAError(Exception):
    """Base class of every error this library raises on purpose."""


class ShapeError(IPAError, ValueError):
    """An array has the wrong shape."""


class RankError(IPAError, ValueError):
    """A rank is not an integer between 1 and the number of features."""


class ArrayTypeError(IPAError, TypeError):
    """An object is not an array, not of a real floating dtype, or of another array library."""


class NonFiniteError(IPAError, ValueError):
    """A batch holds NaN or infinity, or its squares leave the range of the dtype."""


class WeightError(IPAError, ValueError):
    """Row weights are negative or not finite."""


class SettingError(IPAError, ValueError):
    """A setting is out of range, or two learners that should agree in a setting do not."""


class EmptyStreamError(IPAError, ValueError):
    """A projector was asked for before any row was seen."""


class StreamError(IPAError, TypeError):
    """An object is not an activation stream, or cannot be read as often as a learner needs."""


class FileFormatError(IPAError, ValueError):
    """A file or a state is not one of this library's, is damaged, or is of a newer version."""


class MissingDependencyError(IPAError, ModuleNotFoundError):
    """An optional package is missing; the message names the extra that installs it."""


def with_context(error: IPAError, context: str) -> IPAError:
    """Return the same error with ``context`` (a layer, a file, a batch number) before its message.

    Examples
    --------
    >>> with_context(RankError("expected a rank ..., got 9"), "layer 'fc1'")
    RankError("layer 'fc1': expected a rank ..., got 9")
    """
    return type(error)(f"{context}: {error}")
