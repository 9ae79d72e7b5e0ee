"""Saved adapters load in stock PEFT, in a process that cannot import our packages."""

import subprocess
import sys

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

import ipa_hf

from .models import config, make, outputs, text_batches, train

# Family, settings of LoRA and options of get_ipa_model of each case.
CASES = {
    "bert": ("bert", {}, {}),
    "llama": ("llama", {}, {}),
    "llama-trainable": ("llama", {}, {"trainable": True}),
    "llama-lambda": ("llama", {}, {"scaling": 0.25}),
    "llama-rslora": ("llama", {"use_rslora": True}, {}),
    "llama-dora": ("llama", {"use_dora": True}, {}),
    "llama-rank-pattern": ("llama", {"rank_pattern": {"q_proj": 2, "down_proj": 6}}, {}),
    "llama-alpha-pattern": ("llama", {"alpha_pattern": {"q_proj": 2}}, {}),
    "llama-head": ("llama", {"modules_to_save": ["lm_head"]}, {}),
    "llama-all-linear": ("llama", {"target_modules": "all-linear"}, {}),
    "gpt2": ("gpt2", {"fan_in_fan_out": True}, {}),
    "bert-bias": ("bert", {"bias": "all"}, {}),
}

STOCK = """
import sys, warnings
for name in ("ipa_core", "ipa_torch", "ipa_hf", "ipa_timm"):
    sys.modules[name] = None  # makes its import fail
warnings.simplefilter("ignore")
import torch
from pathlib import Path
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoConfig
import transformers

def base(folder):
    kind = AutoConfig.from_pretrained(folder).architectures[0]
    options = {"add_pooling_layer": False} if kind == "BertModel" else {}
    return getattr(transformers, kind).from_pretrained(folder, **options)

root = Path(sys.argv[1])
batch = load_file(root / "batch.safetensors")
results = {}
for case in sys.argv[2:]:
    for merged in (False, True):
        model = PeftModel.from_pretrained(base(root / case / "base"), root / case / "adapter")
        model = model.merge_and_unload() if merged else model
        with torch.no_grad():
            results[case + "/merged" * merged] = model.eval()(**batch)[0].contiguous()
save_file(results, root / "results.safetensors")
"""


@pytest.fixture(scope="module")
def outputs_by_case(tmp_path_factory):
    """Return the outputs of stock PEFT for each case, and the expected ones."""
    root, batches, expected = tmp_path_factory.mktemp("stock"), text_batches(), {}
    torch.manual_seed(0)
    for case, (family, lora, options) in CASES.items():
        base = make(family)
        base.save_pretrained(root / case / "base")
        model = ipa_hf.get_ipa_model(
            base, config(family, **lora), batches, progress=False, **options
        )
        train(model, batches)
        model.save_pretrained(root / case / "adapter")
        expected[case] = outputs(model, batches[0])
    save_file(batches[0], root / "batch.safetensors")
    command = [sys.executable, "-I", "-c", STOCK, str(root), *CASES]
    subprocess.run(command, cwd=root, check=True)
    return load_file(root / "results.safetensors"), expected


@pytest.mark.parametrize("case", CASES)
def test_stock_peft_gives_the_same_outputs(outputs_by_case, case):
    ours, theirs = outputs_by_case[1][case], outputs_by_case[0][case]
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_merged_too(outputs_by_case, case):
    ours, theirs = outputs_by_case[1][case], outputs_by_case[0][f"{case}/merged"]
    torch.testing.assert_close(theirs, ours, atol=1e-5, rtol=1e-5)


def test_training_had_an_effect(outputs_by_case):
    untrained = outputs(make("llama"), text_batches()[0])
    assert (outputs_by_case[1]["llama"] - untrained).abs().max() > 1e-3


def test_loading_in_this_process(family, batches, tmp_path):
    lora = config(family, fan_in_fan_out=family == "gpt2")
    model = ipa_hf.get_ipa_model(make(family), lora, batches, progress=False)
    train(model, batches)
    model.save_pretrained(tmp_path)
    expected = outputs(model, batches[0])
    for load in (PeftModel.from_pretrained, ipa_hf.load_adapter):
        again = outputs(load(make(family), tmp_path), batches[0])
        torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)
