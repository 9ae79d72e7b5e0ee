"""Every command on a page runs, or stands below with the reason why it does not run here.

A command is a line of a block that is not Python, or inline code. Those of a page run one after the
other in a folder of their own, which holds the files they name.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest

from ipa_core import fit_projector, save
from tests import child_process
from tests.tiny_model import write_model

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
PROGRAMS = r"python -m|pip|make|torchrun|accelerate|tar|\S+/pytest"
COMMAND = re.compile(rf"(?:[A-Z_]+=\S+ )*(?:{PROGRAMS}) .")
PIECE = re.compile(
    r"```\w*\n(?P<fence>.*?)```|^ {4}(?P<line>[^\n]+)|`(?P<inline>[^`]+)`", re.DOTALL | re.MULTILINE
)

QUIET = "minutes on a machine with no other work; `make bench` runs its quick form"
STUDY = "hours; `make evidence-quick` runs a cell of it again"
INSTALL = "needs a package index and minutes; test_extras_exist"
MINUTES = "takes minutes"
#: Seconds that a command of a page may take, on a busy machine.
LONGEST = 240

#: Commands that do not run here, and why.
EXCEPTIONS = {
    "make demo": "two minutes on a quiet machine, and downloads; tests/hf/test_demo.py is tiny",
    "make test": "this is it",
    "make evidence-quick": "three minutes, and downloads",
    "make test-families": "all families of timm, half an hour",
    "make test-foreign": "installs 50 packages, and takes a minute; test_foreign_walk.py is tiny",
    "make test-moe-families": "all families of transformers with fused experts, ten minutes",
    "make test-hf-families": "all families of transformers, half an hour",
    "make test-jax": "JAX compiles every operation for every shape; not run to its end",
    "make test-serving": "installs servers, and takes minutes",
    "make test-lowest": "installs the lowest versions",
    "python -m hatchling build": "in the repository; tests/test_packaging.py builds",
    "make test-release": "installs twine; tests/test_packaging.py",
    "make test-trainers": "installs trainers, and takes minutes",
    "make test-quantized": "needs packages that PEFT would import in every other test",
    "make test-search": "searches for minutes, from a fresh seed",
    "make .venv/.installed-bench": INSTALL,
    "pip install .": INSTALL,
    "pip install '.[hf]'": INSTALL,
    "pip install '.[timm]'": INSTALL,
    "pip install '.[sklearn]'": INSTALL,
    "pip install '.[torch]'": INSTALL,
    "pip install '.[torch,dask]'": INSTALL,
    "pip download --no-deps --no-binary peft peft==0.21.2": "needs a package index",
    "tar xzf peft-0.21.2.tar.gz": "unpacks the line above",
    "IPA_PEFT_SOURCE=$PWD/peft-0.21.2 .venv/bin/pytest tests/hf/test_peft_suite.py": MINUTES,
    '.venv/bin/pytest -m "not assets"': "this is it",
    "accelerate launch --cpu": "the page says that it starts no processes without MPI",
    "python -m benchmarks": "half an hour; `make bench` runs its quick form",
    "python -m benchmarks.learners": QUIET,
    "python -m benchmarks.hf_moe_cost": QUIET,
    "python -m benchmarks.likelihood_cost": QUIET,
    "python -m benchmarks.peers": QUIET,
    "python -m benchmarks.peers_sklearn": QUIET,
    "python -m benchmarks.busy_machine": QUIET,
    "python -m benchmarks.growth": QUIET,
    "python -m benchmarks.torch_learning": QUIET,
    "python -m benchmarks.torch_peers": QUIET,
    "python -m benchmarks.torch_training": QUIET,
    "python -m benchmarks.shared_projection": QUIET,
    "python -m benchmarks.short_streams": "400 MB of packages, and minutes",
    "python -m benchmarks.scaling_ranks": MINUTES,
    "python -m benchmarks.scaling_kills": MINUTES,
    "python -m benchmarks.scaling_dask": "writes 8 GB and takes minutes",
    "python -m benchmarks.demo_trainer": "ten minutes; tests/hf/test_smollm2.py is tiny",
    "python -m benchmarks.classification main": STUDY,
    "python -m benchmarks.classification main --task headlines --seeds 5": STUDY,
    "python -m benchmarks.classification main --task cifar10 --seeds 8 --tuned-on 3": STUDY,
    "python -m benchmarks.classification rank": STUDY,
    "python -m benchmarks.classification beyond": STUDY,
    "python -m benchmarks.classification loss": STUDY,
    "python -m benchmarks.commonsense main": STUDY,
    "python -m benchmarks.evidence.similarity": STUDY,
    "python -m benchmarks.likelihood headlines": STUDY,
    "python -m benchmarks.gpu": "minutes on a GPU",
    "python -m benchmarks.gpu study": "eight minutes on a GPU; tests/benchmarks/test_suite.py",
    "python -m benchmarks.gpu_bundle": "half an hour; tests/benchmarks/test_replicas.py",
    "python -m benchmarks.gpu --rehearse": "runs tests beside it; tests/benchmarks/test_suite.py",
    "python -m benchmarks.vtab DATA": "needs timm, and hours; tests/timm/test_vtab.py is tiny",
    "python -m benchmarks.vtab.make_sets DATA": "downloads sets; tests/timm/test_vtab.py is tiny",
}


def read(page):
    """Return a page as the reader has it: with the tables that it takes in, without Python."""
    text = page.read_text(encoding="utf-8")
    text = text.replace("\\\n", " ")
    text = re.sub(r'--8<-- "(.+)"', lambda found: (ROOT / found[1]).read_text("utf-8"), text)
    return re.sub(r"```python.*?```", "", text, flags=re.DOTALL)


def commands(page):
    """Return the commands of a page in their order, each once, without comments."""
    found = []
    for piece in PIECE.finditer(read(page)):
        lines = (piece["fence"] or piece["line"] or piece["inline"].replace("\n", " ")).splitlines()
        found += [" ".join(line.partition(" #")[0].split()) for line in lines]
    return list(dict.fromkeys(filter(COMMAND.match, found)))


EVERY = {page.relative_to(ROOT).as_posix(): commands(page) for page in PAGES}
GIVEN = sorted({command for own in EVERY.values() for command in own})


def is_name(command):
    """Return whether it is only named, as another is given that begins with it."""
    return any(other.startswith(f"{command} ") for other in GIVEN)


def to_run(page):
    return [c for c in EVERY[page] if c not in EXCEPTIONS and not is_name(c)]


@pytest.fixture
def folder(tmp_path):
    """Return a folder with what commands name: data, a model, and what belongs to a checkout."""
    for part in ("benchmarks", "docs"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    x = np.random.default_rng(0).standard_normal((500, 32)).astype("float32")
    np.save(tmp_path / "activations.npy", x)
    for name in ("one", "other"):
        save(fit_projector(x, rank=4), tmp_path / f"{name}.safetensors")
    texts = [json.dumps({"text": "a b c d e f"}) for _ in range(40)]
    (tmp_path / "texts.jsonl").write_text("\n".join(texts))
    write_model(tmp_path / "MODEL")
    return tmp_path


def environment():
    """Return an environment whose ``python`` is this one, with the packages that are tested."""
    paths = [str(ROOT), str(ROOT / "integrations"), os.environ.get("PYTHONPATH", "")]
    programs = [str(Path(sys.executable).parent), os.environ["PATH"]]
    return os.environ | {
        "PATH": os.pathsep.join(programs),
        "PYTHONPATH": os.pathsep.join(paths),
        "OMP_NUM_THREADS": "1",
    }


def run(command, folder, seconds=LONGEST):
    """Return status and output; a command that takes longer fails: make it an exception."""
    options = {"shell": True, "cwd": folder, "env": environment(), "stderr": subprocess.STDOUT}
    done = child_process.run(command, seconds, **options)
    return done.returncode, done.stdout


def test_a_command_that_takes_too_long_is_ended(tmp_path):
    with pytest.raises(AssertionError, match="expected an end within 1 s\nbegun"):
        run("echo begun; sleep 60 & sleep 60", tmp_path, seconds=1)


@pytest.mark.slow
@pytest.mark.parametrize("page", [page for page in EVERY if to_run(page)])
def test_commands_run(page, folder):
    pytest.importorskip("peft")
    programs = r'```python title="(.+?)"\n(.*?)```'
    for name, program in re.findall(programs, (ROOT / page).read_text("utf-8"), re.DOTALL):
        (folder / name).write_text(program)
    for command in to_run(page):
        status, said = run(command, folder)
        assert status == 0, f"{command}\n{said}"
    for table in (folder / "benchmarks" / "results" / "evidence").glob("*.md"):
        committed = ROOT / table.relative_to(folder)
        assert table.read_text("utf-8") == committed.read_text("utf-8"), f"{table.name} is old"


def test_all_kinds_are_found():
    assert len(GIVEN) > 40
    for beginning in ("python -m ipa_core", "python -m ipa_hf", "python -m benchmarks", "torchrun"):
        assert any(c.startswith(beginning) for page in EVERY for c in to_run(page)), beginning


@pytest.mark.parametrize("command", EXCEPTIONS)
def test_exception_is_still_on_a_page(command):
    assert command in GIVEN


@pytest.mark.parametrize("command", [c for c in EXCEPTIONS if c.startswith("python -m")])
def test_exception_exists_with_its_options(command):
    _, _, module, *rest = shlex.split(command)
    source = find_spec(module)
    assert source is not None and source.origin is not None
    if source.submodule_search_locations:
        source = find_spec(f"{module}.__main__")
    known = Path(source.origin).read_text(encoding="utf-8")
    for option in (word for word in rest if word.startswith("--")):
        assert f'"{option}"' in known


@pytest.mark.parametrize("command", [c for c in EXCEPTIONS if c.startswith("make")])
def test_target_exists(command):
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    target = command.removeprefix("make ")
    assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE)


def test_extras_exist():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    named = {
        extra
        for command in GIVEN
        for extras in re.findall(r"pip install .*\[(.+)\]", command)
        for extra in extras.split(",")
    }
    assert named and named <= set(project["optional-dependencies"])
