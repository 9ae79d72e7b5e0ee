"""Contents of the distributions."""

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = {
    "ipa_core": ROOT / "ipa_core",
    "ipa_torch": ROOT / "integrations" / "ipa_torch",
    "ipa_timm": ROOT / "integrations" / "ipa_timm",
    "ipa_hf": ROOT / "integrations" / "ipa_hf",
    "ipa_sklearn": ROOT / "integrations" / "ipa_sklearn",
}


def build(kind: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    (built,) = folder.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """Unpack the wheel where the checkout is out of sight."""
    target = tmp_path_factory.mktemp("site-packages")
    with zipfile.ZipFile(build("wheel", tmp_path_factory.mktemp("dist"))) as wheel:
        wheel.extractall(target)
    return target


def test_wheel_holds_exactly_the_packages(installed):
    names = {path.name for path in installed.iterdir() if path.suffix != ".dist-info"}
    assert names == set(PACKAGES)
    assert all((installed / name / "py.typed").is_file() for name in names)
    assert not list(installed.rglob("__pycache__"))


def test_installed_core_imports_without_the_checkout_and_without_torch(installed):
    program = f"""
import sys
sys.path.insert(0, {str(installed)!r})
import ipa_core
ours = {{name: module for name, module in sys.modules.items() if name.startswith("ipa_")}}
assert all(module.__file__.startswith({str(installed)!r}) for module in ours.values()), ours
assert "torch" not in sys.modules
from importlib.metadata import version
print(version("ipa-projectors"))
"""
    done = subprocess.run(
        [sys.executable, "-I", "-c", program], cwd=installed, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (info,) = installed.glob("*.dist-info")
    assert info.name == f"ipa_projectors-{done.stdout.strip()}.dist-info"


def test_installed_errors_name_a_page_that_is_installed(installed):
    program = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(installed)!r})
import ipa_core.documentation
import ipa_core.errors
try:
    import ipa_torch.errors
except ImportError:
    pass
def errors(base):
    return [base, *(error for sub in base.__subclasses__() for error in errors(sub))]
for error in errors(ipa_core.errors.IPAError):
    (note,) = error("expected this, got that").__notes__
    page = Path(note.removeprefix("More about it: ").partition("#")[0])
    assert page.is_relative_to({str(installed)!r}) and page.is_file(), note
for page in ("docs/activations.md", "docs/peft.md"):  # of the commands
    assert Path(ipa_core.documentation.page_path(page)).is_file()
"""
    done = subprocess.run([sys.executable, "-I", "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_index_accepts_the_distributions(tmp_path):
    pytest.importorskip("twine", reason="twine is not installed: make test-release")
    files = [build(kind, tmp_path / kind) for kind in ("wheel", "sdist")]
    command = [sys.executable, "-m", "twine", "check", "--strict", *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_sdist_holds_sources_only(tmp_path):
    with tarfile.open(build("sdist", tmp_path)) as sdist:
        names = [Path(name).relative_to(Path(name).parts[0]) for name in sdist.getnames()]
    parts = {part for name in names for part in name.parts}
    assert {"ipa_core", "integrations", "tests", "pyproject.toml", "LICENSE"} <= parts
    assert not {part for part in parts if part == "__pycache__" or part.endswith((".pyc", "cache"))}
    assert not {name.parts[0] for name in names} & {".venv", "dist", "site"}
