"""Command line of the core."""

import subprocess
import sys

import numpy as np
import pytest

from ipa_core import __main__, fit_projector, load, save
from ipa_core.__main__ import main

X = np.random.default_rng(0).standard_normal((9000, 6)).astype("float32") * np.arange(6, 0, -1)


@pytest.fixture
def activations(tmp_path):
    np.save(tmp_path / "acts.npy", X.astype("float32"))
    return tmp_path / "acts.npy"


def run(*arguments):
    return main([str(argument) for argument in arguments])


def test_fit_show_compare(activations, tmp_path, capsys):
    out = tmp_path / "p.safetensors"
    assert run("fit", activations, "--rank", 2, "--out", out) == 0
    assert load(out).samples == 9000
    other = tmp_path / "q.safetensors"
    assert run("fit", activations, "--rank", 3, "--out", other, "--learner", "covariance") == 0
    plot = tmp_path / "scree.png"
    assert run("show", out, "--plot", plot) == 0
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert run("compare", out, other) == 0
    printed = capsys.readouterr().out
    assert "captured" in printed
    assert "9,000" in printed
    assert "largest angle (degrees)" in printed


def test_several_layers(tmp_path, capsys):
    p = fit_projector(X, 2)
    save({"q": p, "up": p}, tmp_path / "a.safetensors")
    save({"q": p}, tmp_path / "b.safetensors")
    assert run("show", tmp_path / "a.safetensors") == 0
    assert run("compare", tmp_path / "a.safetensors", tmp_path / "b.safetensors") == 0
    printed = capsys.readouterr().out
    assert "in one file only: up" in printed
    assert "0.0000" in printed
    save({"x": p}, tmp_path / "c.safetensors")
    assert run("compare", tmp_path / "b.safetensors", tmp_path / "c.safetensors") == 1


@pytest.mark.parametrize(
    ("rank", "file", "words"),
    [
        (9, "acts.npy", "a rank of at most 6"),
        (2, "absent.npy", "absent.npy"),
        (2, "acts.txt", "or .feather file"),
    ],
)
def test_errors_are_one_line(activations, tmp_path, capsys, rank, file, words):
    (tmp_path / "acts.txt").write_text("1 2")
    out = tmp_path / "p.safetensors"
    assert run("fit", tmp_path / file, "--rank", rank, "--out", out) == 1
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert words in error
    assert not out.exists()


def test_wrong_usage_and_missing_folder(activations, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        run("fit", activations)
    assert stop.value.code == 2
    assert run("fit", activations, "--rank", 2, "--out", tmp_path / "no" / "p.safetensors") == 1
    assert "to exist" in capsys.readouterr().err


def test_unknown_picture_format_is_one_line(tmp_path, capsys):
    save(fit_projector(X, 2), tmp_path / "p.safetensors")
    assert run("show", tmp_path / "p.safetensors", "--plot", tmp_path / "p.xyz") == 1
    assert capsys.readouterr().err.startswith("error: expected a suffix of a picture format")


def test_no_progress_bar_in_a_log(activations, tmp_path, capsys):
    pytest.importorskip("tqdm")
    assert run("fit", activations, "--rank", 2, "--out", tmp_path / "p.safetensors") == 0
    assert capsys.readouterr().err == ""


def test_interruption_writes_nothing(activations, tmp_path, monkeypatch):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__, "save", interrupt)
    out = tmp_path / "p.safetensors"
    assert run("fit", activations, "--rank", 2, "--out", out) == 130
    assert [file.name for file in tmp_path.iterdir()] == ["acts.npy"]


def test_version_as_a_module():
    done = subprocess.run(
        [sys.executable, "-m", "ipa_core", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("ipa-projectors ")
