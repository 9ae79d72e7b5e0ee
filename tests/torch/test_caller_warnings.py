"""Warnings name the line of the user's code, through hooks, context managers and other packages."""

import warnings

import pytest
import torch

from ipa_core.caller_warnings import warn_caller
from ipa_torch import StoppingCriteria, fit_learners, fit_projectors

from .models import WithIdleLayer


def batches(*, fail=False):
    yield torch.randn(64, 6)
    if fail:
        raise OSError("the disk is gone")


def fit_with_error():
    fit_projectors(
        WithIdleLayer(),
        batches(fail=True),
        2,
        targets="used",
        stop=StoppingCriteria(on_error="return"),
        progress=False,
    )


def fit_that_warns_within_the_model():
    model = WithIdleLayer()
    model.used.register_forward_hook(lambda *_: warn_caller("within two calls of torch"))
    fit_projectors(model, batches(), 2, targets="used", progress=False)


def warns(action):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        action()
    return [warning for warning in caught if warning.category is UserWarning]


@pytest.mark.parametrize(
    "action",
    [
        lambda: fit_projectors(WithIdleLayer(), batches(), 2, progress=False),
        lambda: fit_learners(WithIdleLayer(), batches(), progress=False),
        fit_with_error,
        fit_that_warns_within_the_model,
    ],
)
def test_the_line_of_the_call_is_named(action):
    caught = warns(action)
    assert caught and {warning.filename for warning in caught} == {__file__}


def test_without_a_caller_in_a_file():
    """Code of ``python -c``, or of a notebook, has no file."""
    code = "fit_learners(WithIdleLayer(), batches(), progress=False)"
    caught = warns(lambda: exec(compile(code, "<cell>", "exec"), globals()))
    assert {warning.filename for warning in caught} == {"<cell>"}
