"""Imports of optional packages, with errors that tell a missing package from a broken one."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ipa_core.errors import BrokenDependencyError, IPAError, MissingDependencyError, first_cause


def import_optional(name: str, *, extra: str, user: str) -> Any:
    """Return a module of an optional package.

    Parameters
    ----------
    name : str
        The module, such as ``"matplotlib.figure"``.
    extra : str
        The extra of this distribution that installs it.
    user : str
        The package or the file that needs it.

    Raises
    ------
    MissingDependencyError, BrokenDependencyError
        As `dependency_error` says.

    Examples
    --------
    >>> import_optional("numpy.linalg", extra="none", user="an example").__name__
    'numpy.linalg'
    """
    try:
        return import_module(name)
    except Exception as error:  # clashes of compiled packages raise RuntimeError and others
        raise dependency_error(error, name, extra=extra, user=user) from error


def dependency_error(error: Exception, *names: str, extra: str, user: str) -> IPAError:
    """Return the error to raise from one that importing these modules ended in.

    It is a `MissingDependencyError` if a package is not installed, and a `BrokenDependencyError` if
    it is installed but cannot be imported: another package is missing, or of a version that does
    not fit. Its message has the first cause.

    Examples
    --------
    >>> error = ModuleNotFoundError("No module named 'timm'", name="timm")
    >>> print(dependency_error(error, "timm", extra="timm", user="ipa_timm"))
    ipa_timm needs timm; install it with: pip install 'ipa-projectors[timm]'
    """
    packages = sorted({name.partition(".")[0] for name in names})
    if isinstance(error, ModuleNotFoundError) and error.name in (*packages, *names):
        package = error.name.partition(".")[0]
        return MissingDependencyError(
            f"{user} needs {package}; install it with: pip install 'ipa-projectors[{extra}]'"
        )
    return BrokenDependencyError(
        f"{user} needs {' and '.join(packages)}, but importing them failed: {first_cause(error)}; "
        f"install versions that fit with: pip install --upgrade 'ipa-projectors[{extra}]'"
    )
