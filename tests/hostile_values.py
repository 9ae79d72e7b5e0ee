"""Hostile values for the public callables of several packages, and the check of their errors."""

from pathlib import Path

import numpy as np
import torch

from ipa_core import IPAError


class Opaque:
    """An object without any protocol."""


#: None of them is valid for any parameter of the tables, or it is valid and does no harm.
VALUES = [
    True,
    0,
    -1,
    1.5,
    float("nan"),
    float("-inf"),
    1j,
    np.float32(0.5),
    np.array(2),
    np.array(["a", "b"]),
    "",
    "a.b",
    "a\0b",
    "[",
    b"bytes",
    [],
    (),
    {},
    [None],
    {"a": 1},
    {1: 2},
    iter(()),
    range(2),
    ...,
    Opaque(),
    torch.tensor(2.0),
    torch.float16,
    Path("/absent/folder/file"),
]


def assert_only_our_errors(call, values, path):
    """Check that a call of each value and a folder ends well, or in an error of the library."""
    for value in values:
        path.mkdir(exist_ok=True)
        try:
            call(value, path)
        except IPAError as error:
            assert str(error)
