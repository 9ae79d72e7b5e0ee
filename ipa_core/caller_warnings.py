"""Warnings that name the line from which these packages were called."""

from __future__ import annotations

import sys
import warnings

_PACKAGES = {"ipa_core", "ipa_torch", "ipa_hf", "ipa_timm", "ipa_sklearn"}


def warn_caller(message: str) -> None:
    """Issue a `UserWarning` at the line of the user's code that called into these packages.

    A fixed ``stacklevel`` would name another line after each change of the functions between, and
    a line of torch or contextlib where a hook or a context manager warns.

    Parameters
    ----------
    message : str
    """
    outermost, level, frame = 0, 0, sys._getframe()
    while frame.f_back is not None:
        if str(frame.f_globals.get("__name__")).partition(".")[0] in _PACKAGES:
            outermost = level
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=outermost + 2)
