"""Paths of files: outputs are regular files or new names, inputs files or folders."""

import os
import stat
from pathlib import Path

import numpy as np
import pytest

from ipa_core import (
    ActivationStore,
    FileFormatError,
    IncrementalPCA,
    MissingFileError,
    PathError,
    fit_projector,
    load,
    load_state,
    save,
    save_state,
)
from ipa_core.__main__ import main
from ipa_core.io import atomic_write, paths
from ipa_core.io.atomic_write import check_writable, replace_file

X = np.random.default_rng(0).standard_normal((300, 6)).astype("float32")
PROJECTOR = fit_projector(X, 2)
STATE = IncrementalPCA(2).update(X).state_dict()

WRITERS = {
    "save": lambda path: save(PROJECTOR, path),
    "save_state": lambda path: save_state(STATE, path),
    "replace_file": lambda path: replace_file(path, b"data"),
    "check_writable": check_writable,
}
READERS = {
    "load": load,
    "load_state": load_state,
    "fit_projector": lambda path: fit_projector(path, 2),
    "ActivationStore": ActivationStore,
}


@pytest.fixture(params=WRITERS)
def write(request):
    """Every function that writes a file."""
    return WRITERS[request.param]


@pytest.fixture(params=READERS)
def read(request):
    """Every function that reads files."""
    return READERS[request.param]


@pytest.mark.parametrize("link", [False, True])
@pytest.mark.parametrize("kind", ["pipe", "folder"])
def test_pipes_and_folders_are_not_replaced(tmp_path, write, kind, link):
    target = tmp_path / "target"
    os.mkfifo(target) if kind == "pipe" else target.mkdir()
    path = target
    if link:
        path = tmp_path / "link"
        path.symlink_to(target)
    before = sorted(os.listdir(tmp_path)), os.lstat(target).st_ino
    with pytest.raises(PathError, match=f"new name to write to, got a {kind}"):
        write(path)
    assert (sorted(os.listdir(tmp_path)), os.lstat(target).st_ino) == before


@pytest.mark.parametrize("kind", [stat.S_IFCHR, stat.S_IFBLK])
def test_devices_are_not_replaced(tmp_path, write, monkeypatch, kind):
    """A regular file that says it is a device: no real one may be at risk."""
    path, real = tmp_path / "null", os.stat
    path.write_bytes(b"node")

    def device_stat(name, **kwargs):
        result = real(name, **kwargs)
        if Path(name) != path:
            return result
        return os.stat_result((kind | 0o666, *result[1:]))

    monkeypatch.setattr(paths.os, "stat", device_stat)
    with pytest.raises(PathError, match="got a device"):
        write(path)
    monkeypatch.undo()
    assert path.read_bytes() == b"node" and os.listdir(tmp_path) == ["null"]


def test_links_to_files_stay_links(tmp_path):
    (tmp_path / "folder").mkdir()
    target, link = tmp_path / "folder" / "p", tmp_path / "link"
    link.symlink_to(target)
    for _ in range(2):
        save(PROJECTOR, link)
        assert link.is_symlink() and load(target).rank == 2


def test_paths_that_cannot_be_written(tmp_path, write, monkeypatch):
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for path in (
        loop,
        tmp_path / "no" / "p",
        tmp_path / ("long" * 100),
        b"bytes",
        3,
        None,
        "nul\0",
    ):
        with pytest.raises(PathError):
            write(path)
    (tmp_path / "read-only").write_bytes(b"kept")
    monkeypatch.setattr(paths.os, "access", lambda path, mode: False)
    with pytest.raises(PathError, match="read-only"):
        write(tmp_path / "read-only")
    assert (tmp_path / "read-only").read_bytes() == b"kept"


def test_folders_that_cannot_be_written(tmp_path, write, monkeypatch):
    def refuse(*args):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(atomic_write.os, "open", refuse)
    with pytest.raises(PathError, match="may be written to, got Permission denied"):
        write(tmp_path / "p")


def test_full_disks_leave_the_old_file(tmp_path, monkeypatch):
    def full(*args):
        raise OSError(28, "No space left on device")

    replace_file(tmp_path / "p", b"old")
    monkeypatch.setattr(atomic_write.os, "fsync", full)
    with pytest.raises(PathError, match="No space left"):
        replace_file(tmp_path / "p", b"new")
    assert os.listdir(tmp_path) == ["p"] and (tmp_path / "p").read_bytes() == b"old"


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_new_files_have_the_permissions_of_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        save(PROJECTOR, tmp_path / "p")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "p").stat().st_mode) == 0o666 & ~umask


def test_replaced_files_keep_their_permissions(tmp_path):
    save(PROJECTOR, tmp_path / "p")
    (tmp_path / "p").chmod(0o640)
    save(PROJECTOR, tmp_path / "p")
    assert stat.S_IMODE((tmp_path / "p").stat().st_mode) == 0o640


def test_names_of_the_longest_length(tmp_path):
    path = tmp_path / ("ü" * 127)
    save(PROJECTOR, path)
    assert load(path).rank == 2


def test_home(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(PROJECTOR, "~/p.safetensors")
    assert load("~/p.safetensors").rank == 2
    assert os.listdir(tmp_path) == ["p.safetensors"]


def test_paths_that_cannot_be_read(tmp_path, read):
    loop = tmp_path / "loop.npy"
    loop.symlink_to(loop)
    os.mkfifo(tmp_path / "pipe.npy")
    for path in (loop, tmp_path / "pipe.npy", tmp_path / ("long" * 100), "nul\0"):
        with pytest.raises(PathError):
            read(path)
    for path in (tmp_path / "no" / "x.npy", tmp_path / "no", tmp_path / "x.npy"):
        with pytest.raises(MissingFileError, match="no"):
            read(path)


def test_objects_that_are_no_path():
    for path in (b"x", 3, None, 1.5):
        with pytest.raises(PathError, match="expected a path"):
            load(path)
        with pytest.raises(PathError, match="expected a path"):
            ActivationStore(path)


def test_folders_are_no_projectors(tmp_path):
    for function in (load, load_state):
        with pytest.raises(PathError, match="got a folder"):
            function(tmp_path)


# The command line ------------------------------------------------------------------------------


def run(*arguments):
    return main([str(argument) for argument in arguments])


@pytest.fixture
def no_learning(monkeypatch):
    """Fail if anything is learned."""
    monkeypatch.setattr("ipa_core.__main__.fit_projector", None)


@pytest.mark.parametrize("out", ["acts.npy", "link.npy", "../{folder}/acts.npy"])
def test_the_input_is_not_overwritten(tmp_path, capsys, no_learning, out):
    activations = tmp_path / "acts.npy"
    np.save(activations, X)
    (tmp_path / "link.npy").symlink_to(activations)
    target = tmp_path / out.format(folder=tmp_path.name)
    assert run("fit", activations, "--rank", 2, "--out", target) == 1
    assert "expected another file than the input" in capsys.readouterr().err
    assert np.array_equal(np.load(activations), X)


def test_outputs_inside_the_input_folder_are_refused(tmp_path, capsys, no_learning):
    folder = tmp_path / "acts"
    folder.mkdir()
    np.save(folder / "0.npy", X)
    for out in (folder / "0.npy", folder / "p.safetensors"):
        assert run("fit", folder, "--rank", 2, "--out", out) == 1
        assert "expected another file than the input" in capsys.readouterr().err
    assert os.listdir(folder) == ["0.npy"]


def test_outputs_are_checked_before_learning(tmp_path, capsys, no_learning):
    np.save(tmp_path / "acts.npy", X)
    os.mkfifo(tmp_path / "pipe")
    for out in (tmp_path / "pipe", tmp_path, tmp_path / "no" / "p", tmp_path / ("x" * 300)):
        assert run("fit", tmp_path / "acts.npy", "--rank", 2, "--out", out) == 1
        assert capsys.readouterr().err.startswith("error: ")


def test_plots_have_a_suffix_and_do_not_overwrite_the_projectors(tmp_path, capsys):
    path = tmp_path / "p.png"
    save(PROJECTOR, path)
    assert run("show", path, "--plot", path) == 1
    assert load(path).rank == 2
    assert run("show", path, "--plot", tmp_path / "scree") == 0
    assert f"plot -> {tmp_path / 'scree.png'}" in capsys.readouterr().out
    assert (tmp_path / "scree.png").read_bytes().startswith(b"\x89PNG")
    os.mkfifo(tmp_path / "pipe.png")
    assert run("show", path, "--plot", tmp_path / "pipe.png") == 1
    assert run("show", path, "--plot", tmp_path / "x.xyz") == 1
    assert not (tmp_path / "x.xyz").exists()


# Files of activations --------------------------------------------------------------------------


def save_tensors(path, **tensors):
    torch = pytest.importorskip("torch")
    from safetensors.torch import save_file

    save_file({key: torch.as_tensor(value) for key, value in tensors.items()}, path)


def test_a_vector_beside_the_shards_is_refused_by_name(tmp_path):
    np.save(tmp_path / "0.npy", X)
    for vector in (X.mean(axis=0), X.sum()):
        np.save(tmp_path / "mean.npy", vector)
        with pytest.raises(ValueError, match=r"mean\.npy: expected rows"):
            fit_projector(tmp_path, 2)


def test_tensors_that_are_not_rows_are_refused_by_name(tmp_path):
    torch = pytest.importorskip("torch")
    others = {
        "ids": np.arange(10)[:, None],
        "scale": np.float32(2.0),
        "mean": X.mean(axis=0),
        "f8": torch.ones(2, 6).to(torch.float8_e4m3fn),
        "mask": np.ones((3, 6), dtype=bool),
    }
    for key, value in others.items():
        path = tmp_path / f"{key}.safetensors"
        save_tensors(path, a=X, **{key: value})
        with pytest.raises(
            (ValueError, TypeError), match=f"{key}.safetensors: expected '{key}' to"
        ):
            fit_projector(path, 2)


def test_errors_of_rows_name_file_tensor_and_rows(tmp_path):
    bad = np.tile(X, (30, 1))
    bad[8500, 2] = np.nan
    np.save(tmp_path / "x.npy", bad)
    with pytest.raises(ValueError, match=r"x\.npy, rows 8,192 to 8,999: expected finite"):
        fit_projector(tmp_path / "x.npy", 2)
    save_tensors(tmp_path / "y.safetensors", good=X, bad=bad)
    with pytest.raises(ValueError, match=r"y\.safetensors, 'bad', rows 8,192 to 8,999: exp"):
        fit_projector(tmp_path / "y.safetensors", 2)
    save_tensors(tmp_path / "z.safetensors", a=X, b=X[:, :5].copy())
    for stream in (tmp_path / "z.safetensors", [X, tmp_path / "z.safetensors"]):
        with pytest.raises(ValueError, match=r"z\.safetensors, 'b', rows 0 .* 6 features"):
            fit_projector(stream, 2)


def test_other_files_in_a_folder_are_skipped_with_a_warning(tmp_path):
    np.save(tmp_path / "0.npy", X)
    (tmp_path / "notes.txt").write_text("text")
    (tmp_path / "more").mkdir()
    (tmp_path / ".hidden").write_text("")
    with pytest.warns(UserWarning, match=r"skipped more, notes\.txt"):
        assert fit_projector(tmp_path, 2).samples == 300


def test_files_of_other_kinds_under_our_names(tmp_path):
    np.savez(tmp_path / "x.npz", X)
    (tmp_path / "x.npz").rename(tmp_path / "x.npy")
    with pytest.raises(FileFormatError, match=r"x\.npy: .*got an \.npz archive"):
        fit_projector(tmp_path / "x.npy", 2)
    save(PROJECTOR, tmp_path / "p.safetensors")
    with pytest.raises(FileFormatError, match="expected activations, got a file of format 'ipa-p"):
        fit_projector(tmp_path / "p.safetensors", 2)


def test_files_without_rows_are_empty_streams(tmp_path):
    np.save(tmp_path / "0.npy", np.ones((0, 6)))
    np.save(tmp_path / "1.npy", X)
    assert fit_projector(tmp_path, 2).samples == 300


def test_energies_that_are_not_finite_are_refused(tmp_path):
    from dataclasses import replace

    with pytest.raises(FileFormatError, match="projector '': expected finite energies"):
        save(replace(PROJECTOR, energies=np.array([1.0, np.nan])), tmp_path / "p")
    assert not (tmp_path / "p").exists()
