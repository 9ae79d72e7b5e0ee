"""Import without timm installed."""

import subprocess
import sys


def test_import_names_the_extra():
    program = """
import sys
sys.modules["timm"] = None
try:
    import ipa_timm
except ModuleNotFoundError as error:
    print(type(error).__name__, error)
"""
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert process.stdout.strip() == (
        "MissingDependencyError ipa_timm needs timm; install it with: "
        "pip install 'ipa-projectors[timm]'"
    ), process.stderr
