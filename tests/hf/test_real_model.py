"""MiniLM with real weights on real reviews, as in the demo."""

import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks import demo, demo_task

pytestmark = [pytest.mark.assets, pytest.mark.slow]

STOCK = """
import sys, warnings
for name in ("benchmarks", "ipa_core", "ipa_torch", "ipa_hf", "ipa_timm"):
    sys.modules[name] = None  # makes its import fail
warnings.simplefilter("ignore")
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel

base, adapter, folder = sys.argv[1:]
encoder = PeftModel.from_pretrained(AutoModel.from_pretrained(base), adapter).eval()
head = load_file(f"{adapter}/head.safetensors")
batch = load_file(f"{folder}/batch.safetensors")
mask = batch["attention_mask"].unsqueeze(-1)
with torch.no_grad():
    hidden = encoder(**batch).last_hidden_state
    pooled = (hidden * mask).sum(1) / mask.sum(1)
    logits = pooled @ head["weight"].T + head["bias"]
save_file({"logits": logits}, f"{folder}/logits.safetensors")
"""


@pytest.fixture(scope="module")
def task():
    return demo_task.Task(demo_task.QUICK)


@pytest.fixture(scope="module")
def projectors(task):
    return task.learn()


def test_every_linear_layer_is_learned_and_qkv_share(task, projectors):
    assert len(projectors) == 6 * 6
    assert len(projectors.shared) == 6 * 4
    assert all(0.05 < projector.captured() < 1 for projector in projectors.values())


def test_logits_are_unchanged_before_training(task, projectors):
    batch, _ = task.batch(task.splits.test[:16])
    torch.manual_seed(task.settings.seed)
    plain = demo_task.Classifier(task.encoder()).eval()
    with torch.no_grad():
        ours = task.classifier(demo_task.FROZEN, projectors).eval()(batch)
        torch.testing.assert_close(ours, plain(batch), atol=1e-5, rtol=0)


def test_stock_peft_gives_the_same_logits(task, projectors, tmp_path):
    model = task.classifier(demo_task.FROZEN, projectors)
    task.train(model, 1e-2, "test")
    demo.save(model, tmp_path / "adapter")
    batch, _ = task.batch(task.splits.test[:16])
    model.eval()
    with torch.no_grad():
        expected = model(batch)
    save_file(batch, tmp_path / "batch.safetensors")
    command = [sys.executable, "-I", "-c", STOCK, task.folder, tmp_path / "adapter", tmp_path]
    subprocess.run(list(map(str, command)), cwd=tmp_path, check=True)
    logits = load_file(tmp_path / "logits.safetensors")["logits"]
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


def test_frozen_methods_train_half(task, projectors):
    counts = {x: task.classifier(x, projectors).trainable() for x in demo_task.METHODS}
    assert counts[demo_task.FROZEN] == counts[demo_task.RANDOM] < counts[demo_task.LORA]
    assert counts[demo_task.TRAINABLE] == counts[demo_task.LORA]
