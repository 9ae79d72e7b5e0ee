"""A missing optional package is told from one that is installed but cannot be imported."""

import subprocess
import sys
import textwrap
from importlib.util import find_spec

import pytest

from ipa_core import BrokenDependencyError, MissingDependencyError
from ipa_core.optional_dependencies import import_optional

NEEDS_TORCH = pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")

#: Module of ours, the package that it needs, and the extra that installs the package.
DOORS = [
    pytest.param("ipa_torch", "tqdm", "torch", marks=NEEDS_TORCH),
    ("ipa_hf", "peft", "hf"),
    ("ipa_sklearn", "sklearn", "sklearn"),
    ("ipa_timm", "timm", "timm"),
    ("ipa_core.dask_backend", "dask", "dask"),
]

CLASH = """
try:
    raise RuntimeError("operator torchvision::nms does not exist\\nmore lines")
except RuntimeError as error:
    raise ModuleNotFoundError("Could not import module 'PreTrainedModel'.") from error
"""


def imported(module, *, before=""):
    """Return the error of an import in a process of its own."""
    program = f"""
{before}
try:
    import {module}
except Exception as error:
    print(type(error).__name__, "|", error, "|", type(error.__cause__).__name__)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(("module", "package", "extra"), DOORS)
def test_missing(module, package, extra):
    text = imported(module, before=f"import sys; sys.modules[{package!r}] = None")
    assert text.startswith(f"MissingDependencyError | {module} needs {package}; install it with: ")
    assert f"pip install 'ipa-projectors[{extra}]'" in text


@pytest.mark.parametrize(("module", "package", "extra"), DOORS)
def test_broken(module, package, extra, tmp_path):
    (tmp_path / f"{package}.py").write_text(textwrap.dedent(CLASH))
    text = imported(module, before=f"import sys; sys.path.insert(0, {str(tmp_path)!r})")
    assert text.startswith("BrokenDependencyError | ")
    assert f"{module} needs" in text and package in text
    assert "RuntimeError: operator torchvision::nms does not exist; install versions" in text
    assert text.rstrip().endswith("ModuleNotFoundError")  # the whole chain is kept


def test_a_package_that_another_one_needs(tmp_path, monkeypatch):
    (tmp_path / "half_installed.py").write_text("import no_such_package")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(BrokenDependencyError, match="No module named 'no_such_package'"):
        import_optional("half_installed", extra="dask", user="rows.zarr")


def test_both_are_import_errors():
    assert issubclass(BrokenDependencyError, ImportError)
    assert issubclass(MissingDependencyError, ModuleNotFoundError)
    with pytest.raises(ImportError, match=r"^rows.zarr needs no_such_package; install it with"):
        import_optional("no_such_package", extra="dask", user="rows.zarr")
