"""The path of an activation from the hook to the learner: calls run downwards only."""

import sys

import pytest
import torch

from ipa_core import RandomizedSVD
from ipa_torch import StoppingCriteria, fit_projectors
from ipa_torch._fit import collector
from ipa_torch._layers import async_device

from .models import Transformer

#: Files that an activation passes, from the hook to the learner.
PATH = ("_fit/collector", "_fit/shared_inputs", "_fit/convergence", "_capture/async_update",
        "ipa_core/learners/")  # fmt: skip


def depth_of(frame):
    """Return the position of a frame's file in the path, None for files outside of it."""
    file = frame.f_code.co_filename.replace("\\", "/")
    return next((depth for depth, part in enumerate(PATH) if part in file), None)


def upward_calls(run):
    """Return the calls of a function of an upper file from below, and the depths reached."""
    found, reached = [], set()

    def profile(frame, event, argument):
        if event != "call" or (depth := depth_of(frame)) is None:
            return
        reached.add(depth)
        caller = frame.f_back
        while caller is not None:
            above = depth_of(caller)
            if above is not None and above > depth:
                found.append((caller.f_code.co_qualname, frame.f_code.co_qualname))
            caller = caller.f_back

    sys.setprofile(profile)
    try:
        run()
    finally:
        sys.setprofile(None)
    return found, reached


@pytest.mark.parametrize("asynchronous", [False, True])
def test_no_call_runs_upwards(monkeypatch, asynchronous):
    monkeypatch.setattr(async_device, "is_async_device", lambda device: asynchronous)
    model = Transformer(width=48)
    batches = [torch.randint(0, 20, (16, 40)) for _ in range(4)]
    found, reached = upward_calls(
        lambda: fit_projectors(
            model, batches, 3, learner=RandomizedSVD, progress=False,
            stop=StoppingCriteria(tolerance=1e-9),
        )
    )  # fmt: skip
    assert reached == set(range(len(PATH)))
    assert found == []


def test_an_upward_call_is_found():
    def down(call):
        collector._rows_of(call)

    class Learner:
        @property
        def samples(self):
            return async_device.is_async_device(torch.device("cpu"))

        passes = 1

    code = compile("def lower(call): return call()", "ipa_core/learners/x.py", "exec")
    names = {}
    exec(code, names)
    found, _ = upward_calls(lambda: names["lower"](lambda: down(Learner())))
    assert ("lower", "_rows_of") in found
