"""Errors and interruptions at the n-th call of functions, and at the n-th line of files."""

import gc
import linecache
import sys

ERRORS = [KeyboardInterrupt, MemoryError]


class FailingCalls:
    """Functions of which the n-th call, of all together, raises an error."""

    def __init__(self, monkeypatch, number, error, places):
        self.number, self.error, self.calls = number, error, 0
        for owner, name in places:
            monkeypatch.setattr(owner, name, self._counted(getattr(owner, name)))

    def _counted(self, function):
        def call(*args, **kwargs):
            self.calls += 1
            if self.calls == self.number:
                raise self.error("at a call")
            return function(*args, **kwargs)

        return call


def interrupted(monkeypatch, places, make, call):
    """Yield the result of ``make`` after ``call`` of it failed, for many calls that can fail."""
    number = 1
    while True:
        error, subject = ERRORS[number % 2], make()
        with monkeypatch.context() as patch:
            failing = FailingCalls(patch, number, error, places)
            try:
                call(subject)
            except error as raised:
                assert "at a call" in str(raised)
        if failing.calls < number:
            assert number > 3, "the places are never called"
            return
        yield subject
        number += 1 + number // 3


class InterruptedLine:
    """Trace function that raises a KeyboardInterrupt at the n-th line of some modules.

    Lines ``try:`` are left out, as Python handles no signal there, and lines ``with``, which are
    traced once more before the context ends, where Python handles none until it has ended: locks
    would never be released.
    """

    def __init__(self, number, modules):
        self.number, self.files, self.lines = number, {module.__file__ for module in modules}, 0

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename not in self.files:
            return None
        source = linecache.getline(frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and not source.strip().startswith(("try:", "with ")):
            self.lines += 1
            if self.lines == self.number:
                raise KeyboardInterrupt("at a line")
        return self


def interrupted_at_lines(modules, make, call):
    """Yield the result of ``make`` after ``call`` of it was interrupted, for each line that runs.

    A context that no call ends any more, as the interruption came between two lines, ends when it
    is collected.
    """
    number = 1
    while True:
        subject, line, before = make(), InterruptedLine(number, modules), sys.gettrace()
        sys.settrace(line)
        try:
            call(subject)
        except KeyboardInterrupt as raised:
            assert "at a line" in str(raised)
        finally:
            sys.settrace(before)
        if line.lines < number:
            assert number > 3, "the lines never run"
            return
        gc.collect(1)
        yield subject
        number += 1
