"""Command line with hostile paths, options, files and disks: a status, one line, no new file."""

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from ipa_core import FileFormatError, IncrementalPCA, fit_projector, load, save, save_state
from ipa_core.__main__ import main
from ipa_core.io import serialization
from ipa_core.io.activation_store import ActivationStore

X = np.random.default_rng(0).standard_normal((300, 6)).astype("float32")
PROJECTOR = fit_projector(X, 2)


@pytest.fixture(autouse=True)
def empty_folder(tmp_path_factory, monkeypatch):
    """Let ``.`` and ``..`` be empty folders, wherever the tests run."""
    folder = tmp_path_factory.mktemp("parent") / "current"
    folder.mkdir()
    monkeypatch.chdir(folder)


def run(capsys, *arguments):
    """Run a command; return its status and the lines of its errors."""
    try:
        status = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().err.splitlines()


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def assert_refused(capsys, *arguments):
    status, lines = run(capsys, *arguments)
    assert status in (1, 2) and lines
    assert "error: " in lines[-1]
    assert status == 2 or len(lines) == 1, lines


@pytest.fixture
def files(tmp_path):
    """Return a folder with a file of activations and one of a projector."""
    np.save(tmp_path / "acts.npy", X)
    save(PROJECTOR, tmp_path / "p.safetensors")
    return tmp_path


PATHS = ["", ".", "..", "/", "absent", "text.txt", "folder", "folder.npy", "loop", "pipe.npy",
         "acts.npy/below", "acts.npy#name", "/dev/null", "~nobody-of-this-name/x", "nul\0",
         "long" * 2000]  # fmt: skip


def hostile_path(folder, name):
    made = {
        "text.txt": lambda path: path.write_text("text"),
        "folder": lambda path: path.mkdir(),
        "folder.npy": lambda path: path.mkdir(),
        "loop": lambda path: path.symlink_to(path),
        "pipe.npy": os.mkfifo,
    }
    path = folder / name
    if name in made:
        made[name](path)
    relative = name and not name.startswith((".", "/", "~"))
    return path if relative else name


@pytest.mark.parametrize("name", PATHS)
def test_paths(files, capsys, name):
    path, good = hostile_path(files, name), files / "p.safetensors"
    before = contents(files) if name != "pipe.npy" else {}
    assert_refused(capsys, "fit", path, "--rank", 2, "--out", files / "new")
    assert_refused(capsys, "show", path)
    assert_refused(capsys, "compare", path, good)
    assert_refused(capsys, "compare", good, path)
    if name not in ("absent", "text.txt", "acts.npy#name"):
        assert_refused(capsys, "fit", files / "acts.npy", "--rank", 2, "--out", path)
    assert name == "pipe.npy" or contents(files) == before


@pytest.mark.parametrize("name", ["", ".", "..", "/", "folder", "below/x.png", "nul\0.png"])
def test_plots_go_to_picture_files(files, capsys, name):
    (files / "folder").mkdir()
    path = files / name if name and name[0] not in "./" else name
    assert_refused(capsys, "show", files / "p.safetensors", "--plot", path)
    assert {entry.name for entry in files.iterdir()} == {"acts.npy", "p.safetensors", "folder"}


@pytest.mark.parametrize(
    "options",
    [["--rank", text] for text in ("", "0", "-1", "7", "1.5", "nan", "two", "9" * 40)]
    + [["--rank", "2", "--seed", text] for text in ("", "-1", "1.5", "x")]
    + [["--rank", "2", "--learner", text] for text in ("", "svd", "RandomizedSVD")]
    + [["--rank", "2", option] for option in ("--center=x", "--plot", "extra")],
)
def test_options(files, capsys, options):
    assert_refused(capsys, "fit", files / "acts.npy", "--out", files / "new", *options)
    assert not (files / "new").exists()


def write_zarr(path):
    pytest.importorskip("zarr").save_array(str(path), X)
    return path / "zarr.json"


def write_hdf5(path):
    with pytest.importorskip("h5py").File(path, "w") as file:
        file["x"] = X


def write_arrow(path):
    arrow = pytest.importorskip("pyarrow")
    rows = arrow.FixedSizeListArray.from_arrays(arrow.array(X.ravel()), 6)
    table = arrow.table({"x": rows})
    if path.suffix == ".parquet":
        pytest.importorskip("pyarrow.parquet").write_table(table, path)
    else:
        pytest.importorskip("pyarrow.feather").write_feather(table, path)


FORMATS = {
    "x.npy": lambda path: np.save(path, X),
    "x.npz": lambda path: np.savez_compressed(path, x=X),
    "x.safetensors": lambda path: save_file({"x": X}, path),
    "x.zarr": write_zarr,
    "x.h5": write_hdf5,
    "x.parquet": write_arrow,
    "x.feather": write_arrow,
    "projector": lambda path: save(PROJECTOR, path),
    "state": lambda path: save_state(IncrementalPCA(2).update(X).state_dict(), path),
}


def damaged(whole):
    """Yield nothing, garbage, beginnings, and contents of which some bytes are others."""
    draw = random.Random(0)
    yield from (b"", b"\0" * 100, b"garbage" * 50, whole[: len(whole) // 2], whole[:-1])
    for _ in range(40):
        changed = bytearray(whole)
        for _ in range(draw.choice([1, 3])):
            changed[draw.randrange(draw.choice([len(whole), min(len(whole), 200)]))] = (
                draw.randrange(256)
            )
        yield bytes(changed)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", FORMATS)
def test_damaged_files(tmp_path, capsys, name):
    """Formats without a digest may still be read; nothing else than a projector is written."""
    path, out = tmp_path / name, tmp_path / "out"
    file = FORMATS[name](path) or path
    for data in damaged(file.read_bytes()):
        file.write_bytes(data)
        out.write_bytes(b"previous")
        rows = name.startswith("x.")
        command = ("fit", path, "--rank", 2, "--out", out) if rows else ("show", path)
        status, lines = run(capsys, *command)
        if status == 0:
            assert rows and load(out).rank == 2
        else:
            assert (status, len(lines)) == (1, 1) and lines[0].startswith("error: ")
            assert out.read_bytes() == b"previous"
        assert {entry.name for entry in tmp_path.iterdir()} == {name, "out"}


def test_damaged_chunk_of_zarr(tmp_path, capsys):
    write_zarr(tmp_path / "x.zarr")
    chunk = next(path for path in (tmp_path / "x.zarr" / "c").rglob("*") if path.is_file())
    chunk.write_bytes(b"garbage")
    assert_refused(capsys, "fit", tmp_path / "x.zarr", "--rank", 2, "--out", tmp_path / "out")


def test_more_memory_than_there_is(tmp_path, capsys, monkeypatch):
    def refuse(*_, **__):
        raise MemoryError

    np.savez(tmp_path / "x.npz", x=X)
    monkeypatch.setattr(np, "load", refuse)
    assert_refused(capsys, "fit", tmp_path / "x.npz", "--rank", 2, "--out", tmp_path / "out")


# A disk that is full, read-only or gone, at each call of each function that writes. -----------


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("function", ["open", "fdopen", "fsync", "replace"])
@pytest.mark.parametrize("call", [1, 2])
def test_disks_that_fail(files, capsys, monkeypatch, code, function, call):
    out = files / "out"
    out.write_bytes(b"previous")
    before, real, calls = contents(files), getattr(os, function), []

    def fail(*arguments, **options):
        calls.append(function)
        if len(calls) == call:
            raise OSError(code, os.strerror(code))
        return real(*arguments, **options)

    monkeypatch.setattr(os, function, fail)
    status, lines = run(capsys, "fit", files / "acts.npy", "--rank", 2, "--out", out)
    monkeypatch.undo()
    if status == 0:
        assert len(calls) < call and load(out).rank == 2
        return
    assert (status, len(lines)) == (1, 1) and os.strerror(code) in lines[0]
    assert contents(files) == before


def test_files_that_may_not_be_read(files, capsys, monkeypatch):
    def refuse(path, *_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(np, "load", refuse)
    monkeypatch.setattr(serialization, "safe_open", refuse)
    assert_refused(capsys, "fit", files / "acts.npy", "--rank", 2, "--out", files / "out")
    assert_refused(capsys, "show", files / "p.safetensors")
    (files / "store").mkdir()
    (files / "store" / "index.json").write_text("{}")
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(OSError, match="expected a file that can be read, got .*denied"):
        ActivationStore(files / "store")


# Outputs that cannot show or take what is printed. ----------------------------------------------


def shell(command, folder, unbuffered, **environment):
    return subprocess.run(
        ["bash", "-c", f"{sys.executable} -m ipa_core {command}"],
        cwd=folder,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


DISK_FULL = "error: [Errno 28] No space left on device"


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("command", "environment", "output", "errors"),
    [
        ("show wide.safetensors", {"PYTHONIOENCODING": "ascii"}, r"\xfc", ""),
        ("show wide.safetensors >&-", {}, "", ""),
        ("show many.safetensors | head -c 9", {}, "", ""),
        ("show wide.safetensors > /dev/full", {}, "", DISK_FULL),
        ("show many.safetensors > /dev/full", {}, "", DISK_FULL),
    ],
)
def test_outputs(tmp_path, command, environment, output, errors, unbuffered):
    save({"ü": PROJECTOR}, tmp_path / "wide.safetensors")
    save({f"layer {number}": PROJECTOR for number in range(9000)}, tmp_path / "many.safetensors")
    done = shell(command, tmp_path, unbuffered, **environment)
    assert output in done.stdout and done.stderr.strip() == errors


# Files with a digest that matches, and other contents than any writer gave them. ----------------

ENTRY = {"total_energy": PROJECTOR.total_energy, "samples": PROJECTOR.samples}
ARRAYS = {
    f"q/{name}": np.ascontiguousarray(getattr(PROJECTOR, name))
    for name in ("components", "mean", "energies")
}
OTHER = [None, 3, "x", [], [1], {}, {"a": 1}]


def sealed(content):
    text = content if isinstance(content, str) else json.dumps(content)
    kind = serialization._PROJECTORS
    header = {"format": kind.name, "format_version": "1", "content": text}
    return serialization.to_bytes(ARRAYS, metadata={**header, "sha256": kind._digest(text, ARRAYS)})


@pytest.mark.parametrize(
    "content",
    [*OTHER, "", "{", "[" * 100_000, {"projectors": {"q": ENTRY}}]
    + [{"single": False, "projectors": other} for other in OTHER[:-2]]
    + [{"single": True, "projectors": {"q": ENTRY}}]
    + [{"single": False, "projectors": {"q": other}} for other in OTHER]
    + [
        {"single": False, "projectors": {"q": ENTRY, "k": {"same_as": other}}}
        for other in (*OTHER, "k")
    ],
    ids=lambda content: str(content)[:40],
)
def test_contents_of_another_form(tmp_path, capsys, content):
    path = tmp_path / "p.safetensors"
    path.write_bytes(sealed(content))
    with pytest.raises(FileFormatError, match=r"p\.safetensors: (?!.*digest)"):
        load(path)
    assert_refused(capsys, "show", path)
