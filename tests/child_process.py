"""Child processes of tests: their output within a time, and the end of all of them."""

import os
import signal
import subprocess
from contextlib import suppress


def run(command, seconds=300, **options):
    """Run a command; return its status, output and errors as ``subprocess.run`` does.

    After ``seconds`` the command fails with what it printed, and its whole process group is killed:
    ``subprocess.run`` kills only the parent, then waits for pipes that the children hold open.
    """
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True} | options
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except BaseException as error:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            if not isinstance(error, subprocess.TimeoutExpired):
                raise
            output, errors = process.communicate(timeout=60)
            raise AssertionError(
                f"{command}: expected an end within {seconds} s\n{output}\n{errors}"
            ) from None
    return subprocess.CompletedProcess(command, process.returncode, output, errors)
