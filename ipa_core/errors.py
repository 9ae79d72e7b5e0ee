"""Exceptions: one base class; every subclass is also the matching built-in exception."""

from __future__ import annotations

from typing import ClassVar

from ipa_core.documentation import page_path


class IPAError(Exception):
    """Base class of the library's errors.

    The message says what to do; a note below the traceback names the page of the documentation
    with more.

    Attributes
    ----------
    page : str
        Path of that page in the repository; the note has the path in the installed package.
    """

    page: ClassVar[str] = "docs/questions.md"

    def __init__(self, *args: object) -> None:
        super().__init__(*args)
        self.add_note(f"More about it: {page_path(self.page)}")


class ShapeError(IPAError, ValueError):
    """An array has the wrong shape."""

    page = "docs/activations.md"


class RankError(IPAError, ValueError):
    """A rank is not an integer between 1 and the number of features."""

    page = "docs/questions.md#which-rank"


class ArrayTypeError(IPAError, TypeError):
    """An object is not an array, not of a real floating dtype, or of another array library."""

    page = "docs/activations.md"


class NonFiniteError(IPAError, ValueError):
    """A batch holds NaN or infinity, or its squares leave the range of the dtype."""

    page = "docs/questions.md#what-does-an-error-with-a-layer-and-nan-say"


class WeightError(IPAError, ValueError):
    """Row weights are integers, negative or not finite."""

    page = "docs/activations.md#what-a-stream-can-be"


class SettingError(IPAError, ValueError):
    """A setting is out of range, or two learners differ in a setting that must be equal."""

    page = "docs/learners.md"


class EmptyStreamError(IPAError, ValueError):
    """No row of positive weight has been learned from."""

    page = "docs/activations.md"


class StreamError(IPAError, TypeError):
    """An object is not an activation stream, or cannot be read as often as a learner needs it."""

    page = "docs/activations.md#what-a-stream-can-be"


class FileFormatError(IPAError, ValueError):
    """A file or a state is of another format or version, or is damaged."""

    page = "docs/activations.md#what-you-get"


class PathError(IPAError, OSError):
    """A path cannot be read or written, or is not that of a regular file."""

    page = "docs/activations.md#what-you-get"


class MissingFileError(PathError, FileNotFoundError):
    """There is no such file or folder."""


class MissingDependencyError(IPAError, ModuleNotFoundError):
    """An optional package is missing; the message names the extra that installs it."""

    page = "docs/index.md#install"


class BrokenDependencyError(IPAError, ImportError):
    """An optional package is installed but cannot be imported; the message has the cause."""

    page = "docs/index.md#install"


def with_context(error: IPAError, context: str) -> IPAError:
    """Return the same error with ``context`` (a layer, a file, a batch number) before its message.

    Examples
    --------
    >>> with_context(RankError("expected a rank ..., got 9"), "layer 'fc1'")
    RankError("layer 'fc1': expected a rank ..., got 9")
    """
    return type(error)(f"{context}: {error}")


def first_cause(error: BaseException) -> str:
    """Return the class and first line of the error that an error followed from.

    Examples
    --------
    >>> try:
    ...     try:
    ...         raise RuntimeError("operator torchvision::nms does not exist")
    ...     except RuntimeError as error:
    ...         raise ModuleNotFoundError("Could not import module 'PreTrainedModel'.") from error
    ... except ModuleNotFoundError as error:
    ...     print(first_cause(error))
    RuntimeError: operator torchvision::nms does not exist
    """
    while cause := error.__cause__ or error.__context__:
        error = cause
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"
