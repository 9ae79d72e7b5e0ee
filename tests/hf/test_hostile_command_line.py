"""Hostile input of the command line: one line and a status, and the files stay as they were."""

import errno
import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import pytest
import transformers
from peft import PeftModel

from ipa_hf import __main__, adapter_directory, calibration_data
from ipa_hf.__main__ import main
from ipa_torch._fit import checkpoint
from tests.tiny_model import letter_tokenizer

HEADS = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
TEXTS = "a b c d\ne f g h\ni j k l\n"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Return a folder with a tiny Llama and a word tokenizer."""
    folder = tmp_path_factory.mktemp("files") / "model"
    config = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, vocab_size=16, **HEADS)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    template = "{% for m in messages %}{{ m['content'].strip() }} {% endfor %}"
    letter_tokenizer(chat_template=template).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def vision_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("files") / "vit"
    size = {"hidden_size": 8, "intermediate_size": 8, "image_size": 8, "patch_size": 4}
    transformers.ViTModel(
        transformers.ViTConfig(**size, num_hidden_layers=1, num_attention_heads=2)
    ).save_pretrained(folder)
    settings = {"image_processor_type": "ViTImageProcessor", "size": {"height": 8, "width": 8}}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def work(tmp_path):
    """Return a folder with texts and an adapter with a file of the user's."""
    (tmp_path / "texts.txt").write_text(TEXTS)
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "adapter_model.safetensors").write_text("old")
    (tmp_path / "adapter" / "mine.txt").write_text("mine")
    return tmp_path


def contents(folder):
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in folder.rglob("*")
    }


def fit(model, data, out, *options):
    return main([str(x) for x in ("fit", model, data, "--out", out, "--rank", "2", *options)])


def refused(capsys, call, *parts, status=1):
    """Check the status, and that the parts are in one line of stderr."""
    capsys.readouterr()
    try:
        assert call() == status
    except SystemExit as usage:  # wrong usage ends in argparse
        assert usage.code == status
    lines = [x for x in capsys.readouterr().err.splitlines() if ": expected" in x or "stopped" in x]
    assert len(lines) == 1 and lines[0].startswith(("ipa_hf: ", "python -m ipa_hf fit: error: "))
    assert all(part in lines[0] for part in parts), lines


@pytest.mark.parametrize(
    "option",
    [
        *[f"--{name}={x}" for name in ("rank", "samples", "batch-size") for x in (0, -1, "x", 1.5)],
        *[f"--{name}={x}" for name in ("max-length", "max-bytes") for x in (0, "")],
        *[f"--alpha={x}" for x in ("nan", "inf", 0, "x", "")],
        *[f"--scaling={x}" for x in ("nan", 0, -1, "x", "")],
        *[f"--targets={x}" for x in ("", ",", "q_proj,,v_proj", "all-linear,")],
        "--out=",
        "--out=a\0b",
    ],
)
def test_values_of_options(model, work, capsys, option):
    before = contents(work)
    call = lambda: fit(model, work / "texts.txt", work / "adapter", option)  # noqa: E731
    refused(capsys, call, option[2:].partition("=")[0], "expected", "got", status=2)
    assert contents(work) == before


@pytest.mark.parametrize(
    ("out", "message"),
    [
        ("/", "the root folder"),
        ("/dev/null", "got a device"),
        ("texts.txt", "got a file"),
        ("texts.txt/below", "Not a directory"),
        ("loop", "symbolic links"),
        ("taken", "expected a regular file or a new name"),
        ("model", "expected another directory"),
    ],
)
def test_outputs_are_refused_before_anything_is_loaded(
    model, work, monkeypatch, capsys, out, message
):
    monkeypatch.setattr(__main__, "load_model", None)
    monkeypatch.setattr(__main__, "CalibrationData", None)
    (work / "loop").symlink_to(work / "loop")
    (work / "taken" / "adapter_model.safetensors").mkdir(parents=True)
    (work / "model").symlink_to(model)
    before = contents(work)
    refused(capsys, lambda: fit(model, work / "texts.txt", work / out), message)
    assert contents(work) == before


@pytest.mark.parametrize("content", [None, "cut", "null"])
@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_damaged_models(model, work, capsys, name, content):
    folder = work / "model"
    shutil.copytree(model, folder)
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(data[:-20] if content == "cut" else content.encode())
    before = contents(work)
    refused(capsys, lambda: fit(folder, work / "texts.txt", work / "new"), str(folder))
    assert contents(work) == before


def test_models_that_are_not_there_or_no_models(model, work, capsys):
    for name in ("/absent/model", "./absent", work / "texts.txt", work / "adapter"):
        refused(capsys, lambda name=name: fit(name, work / "texts.txt", work / "new"), str(name))
    settings = json.loads((model / "config.json").read_text())
    for fields in ({"hidden_size": 16}, {"hidden_size": "x"}, {"num_attention_heads": 0}):
        shutil.copytree(model, work / "model", dirs_exist_ok=True)
        (work / "model" / "config.json").write_text(json.dumps(settings | fields))
        call = lambda: fit(work / "model", work / "texts.txt", work / "new")  # noqa: E731
        refused(capsys, call, str(work / "model"))
    # Only classes of models are taken from the configuration.
    for architectures in (["pipeline"], [5]):
        text = json.dumps(settings | {"architectures": architectures})
        (work / "model" / "config.json").write_text(text)
        assert fit(work / "model", work / "texts.txt", work / "new") == 0


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, "line 1: expected a JSON object"),
        ('{"text": null}', "line 1: expected a JSON object"),
        ('{"text": ["a"]}', "line 1: expected a JSON object"),
        ('{"messages": "a"}', "line 1: expected a JSON object"),
        ('{"messages": [5]}', "line 1, got"),
        ('{"messages": [{"content": 5}]}', "line 1, got UndefinedError"),
        ('{"text": "  "}', "expected a text in each line, got none"),
        ('{"text": "\\ud800"}', "expected samples that the tokenizer"),
    ],
)
def test_lines_that_are_no_samples(model, work, capsys, line, message):
    (work / "rows.jsonl").write_text(line + "\n")
    before = contents(work)
    refused(capsys, lambda: fit(model, work / "rows.jsonl", work / "new"), message)
    assert contents(work) == before


def test_data_that_cannot_be_read(model, work, capsys):
    (work / "latin.txt").write_bytes("é\n".encode("latin-1"))
    (work / "empty.txt").write_text("\n\n")
    for name, message in (
        ("latin.txt", "in UTF-8"),
        ("empty.txt", "expected a text in each line"),
        ("absent.txt", "absent.txt"),
    ):
        refused(capsys, lambda name=name: fit(model, work / name, work / "new"), message)
    shutil.copytree(model, work / "model")
    (work / "model" / "chat_template.jinja").write_text("{% for %}")
    (work / "rows.jsonl").write_text('{"messages": [{"content": "a"}]}\n')
    call = lambda: fit(work / "model", work / "rows.jsonl", work / "new")  # noqa: E731
    refused(capsys, call, "messages that the chat template takes", "TemplateSyntaxError")


def test_tokens_that_the_model_does_not_have(model, work, capsys):
    shutil.copytree(model, work / "model")
    small = transformers.LlamaConfig(hidden_size=8, intermediate_size=8, vocab_size=4, **HEADS)
    transformers.LlamaForCausalLM(small).save_pretrained(work / "model")
    before = contents(work)
    call = lambda: fit(work / "model", work / "texts.txt", work / "new")  # noqa: E731
    refused(capsys, call, "IndexError: index out of range", "the tokenizer of the model")
    assert contents(work) == before


def test_images_that_are_none(vision_model, work, capsys):
    from PIL import Image

    images = work / "images"
    (images / "folder.png").mkdir(parents=True)  # passed over
    Image.new("RGB", (9, 9)).save(images / "good.png")
    assert fit(vision_model, images, work / "new") == 0
    for make in (
        lambda path: path.write_bytes((images / "good.png").read_bytes()[:-30]),
        lambda path: path.write_text("text"),
        lambda path: path.symlink_to("absent"),
        lambda path: os.mkfifo(path),  # would be waited for
    ):
        make(images / "bad.png")
        before = contents(work)
        refused(capsys, lambda: fit(vision_model, images, work / "other"), "bad.png")
        assert contents(work) == before
        (images / "bad.png").unlink()


def test_targets_without_a_linear_layer(model, work, capsys):
    before = contents(work)
    options = ("--targets", "embed_tokens")
    call = lambda: fit(model, work / "texts.txt", work / "adapter", *options)  # noqa: E731
    with pytest.warns(UserWarning, match="Embedding layers are not supported"):
        refused(capsys, call, "expected linear layers among the targets")
    assert contents(work) == before


def test_files_of_the_user_are_kept(model, work):
    (work / "adapter.learning").mkdir()
    (work / "adapter.learning" / "mine.txt").write_text("mine")
    (work / "adapter" / "README.md").write_text("# Mine\n")
    assert fit(model, work / "texts.txt", work / "adapter") == 0
    assert (work / "adapter" / "mine.txt").read_text() == "mine"
    assert "# Mine" in (work / "adapter" / "README.md").read_text()
    assert contents(work / "adapter.learning") == {"mine.txt": b"mine"}
    assert sorted(path.name for path in work.iterdir()) == [
        "adapter",
        "adapter.learning",
        "texts.txt",
    ]


@contextmanager
def failing(monkeypatch, owner, name, error, call=0):
    """Raise an error in one call of a function."""
    function, calls = getattr(owner, name), []

    def counted(*args, **kwargs):
        calls.append(name)
        if len(calls) == call + 1:
            raise error
        return function(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, counted)
        yield
    assert len(calls) > call


NO_SPACE = OSError(errno.ENOSPC, "No space left on device")
DENIED = PermissionError(errno.EACCES, "Permission denied")
STOPPED = KeyboardInterrupt()
#: Functions that read, compute and write, in the order of a fit, with the number of the call.
MOMENTS = [
    (calibration_data.AutoTokenizer, "from_pretrained", 0, STOPPED),
    (transformers.LlamaForCausalLM, "from_pretrained", 0, DENIED),
    (calibration_data.CalibrationData, "_tokens", 1, STOPPED),
    (transformers.LlamaForCausalLM, "forward", 1, STOPPED),
    (checkpoint, "_write_file", 0, NO_SPACE),
    (checkpoint, "_write_file", 4, STOPPED),
    (PeftModel, "save_pretrained", 0, NO_SPACE),
    (adapter_directory.shutil, "copy2", 0, DENIED),
    (adapter_directory, "_replace_files", 0, STOPPED),
    (__main__, "remove_checkpoints", 0, STOPPED),
]
OPTIONS = ("--batch-size", "2", "--targets", "q_proj,down_proj")


@pytest.fixture
def often(monkeypatch):
    monkeypatch.setattr(__main__, "CHECKPOINT_SECONDS", 1e-9)  # after each batch


@pytest.fixture(scope="module")
def expected(model, tmp_path_factory):
    """Return the files of a fit without errors."""
    folder = tmp_path_factory.mktemp("expected")
    (folder / "texts.txt").write_text(TEXTS)
    assert fit(model, folder / "texts.txt", folder / "adapter", *OPTIONS) == 0
    return contents(folder / "adapter")


@pytest.mark.parametrize(("owner", "name", "call", "error"), MOMENTS, ids=lambda x: str(x)[-16:])
def test_errors_and_interruptions(
    model, work, expected, monkeypatch, capsys, often, owner, name, call, error
):
    """The adapter is the old one or the new one, and the same command goes on."""
    old = contents(work / "adapter")
    run = lambda: fit(model, work / "texts.txt", work / "adapter", *OPTIONS)  # noqa: E731
    with failing(monkeypatch, owner, name, error, call):
        if error is STOPPED:
            refused(capsys, run, "run the same command again to resume", status=130)
        else:
            refused(capsys, run, str(error)[-10:])
    if owner is not __main__:
        assert contents(work / "adapter") == old
    assert {path.name for path in work.iterdir()} <= {"adapter", "adapter.learning", "texts.txt"}
    assert run() == 0
    assert contents(work / "adapter") == expected | {"mine.txt": b"mine"}
    assert not (work / "adapter.learning").exists()


def test_files_that_were_replaced_come_back(model, work, monkeypatch, capsys):
    old = contents(work / "adapter")
    replace = os.replace

    def interrupted(source, target):
        if str(target).endswith("ipa_adapter.json") and ".writing" not in str(target):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        refused(capsys, lambda: fit(model, work / "texts.txt", work / "adapter"), status=130)
    assert contents(work / "adapter") == old


def test_half_of_a_removed_checkpoint_is_no_checkpoint(model, work, monkeypatch, often):
    def interrupted(path, **options):
        for file in path.glob("*.safetensors"):
            file.unlink()
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", interrupted)
        assert fit(model, work / "texts.txt", work / "new", *OPTIONS) == 130
    assert fit(model, work / "texts.txt", work / "new", *OPTIONS) == 0
    assert not (work / "new.learning").exists()


def test_an_error_before_the_first_checkpoint_leaves_no_folder(model, work, capsys):
    call = lambda: fit(model, work / "texts.txt", work / "new" / "adapter", "--rank", "99")  # noqa: E731
    refused(capsys, call, "expected a rank of at most 8")
    assert contents(work / "new") == {}


def test_metadata_of_other_types(work, capsys):
    layer = {"rank": 2, "scale": 1.0, "captured": 0.5, "samples": 9}
    content = {"format": "ipa-adapter", "format_version": 2, "frozen": True, "scaling": "energy"}
    for fields in (
        {"frozen": "no"},
        {"scaling": None},
        {"layers": [layer]},
        {"layers": {"a": layer | {"rank": "x"}}},
        {"layers": {"a": layer | {"captured": "x"}}},
    ):
        changed = content | {"layers": {"a": layer}} | fields
        digest = hashlib.sha256(json.dumps(changed, sort_keys=True).encode()).hexdigest()
        path = work / "adapter" / "ipa_adapter.json"
        path.write_text(json.dumps(changed | {"sha256": digest}))
        refused(capsys, lambda: main(["show", str(work / "adapter")]), "expected adapter metadata")


def test_a_directory_on_a_volume_of_its_own(tmp_path, monkeypatch):
    folder = tmp_path / "volume"
    folder.mkdir()
    replace = os.replace

    def within_a_volume(old, new):
        if (folder in Path(old).parents) != (folder in Path(new).parents):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        replace(old, new)

    class Adapter:
        def save_pretrained(self, directory):
            (Path(directory) / "adapter_config.json").write_text("{}")

    monkeypatch.setattr(adapter_directory.os, "replace", within_a_volume)
    adapter_directory.save_adapter(Adapter(), folder)
    assert [path.name for path in folder.iterdir()] == ["adapter_config.json"]
