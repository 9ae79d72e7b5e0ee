"""Pytest plugin that runs PEFT's tests on models initialized by ipa_hf.

It selects PEFT's tests of custom models with LoRA whose names contain a word of `KEPT`. Each LoRA
adapter that such a test adds is initialized from projections of the model's inputs, with A frozen;
B keeps the values that the test gave it. `tests/hf/test_peft_suite.py` runs the plugin.
"""

import sys
import warnings
from functools import wraps
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

import peft
import pytest
import torch
import transformers  # noqa: F401
from peft import LoraConfig, PeftModel

import ipa_hf
from ipa_core.errors import IPAError
from ipa_hf.lora_layers import lora_A_and_B, lora_layers, takes_projection

KEPT = ("save", "load", "merge", "mixed", "disable", "delete")
HUB = {  # tests that download models
    "test_delete_adapter_multiple_adapters_with_trainable_token_indices",
    "test_dora_save_and_load_remapping",
    "test_gpt2_dora_merge_and_unload",
    "test_gpt2_dora_merge_and_unload_safe_merge",
    "test_multiple_adapters_automatic_modules_to_save",
    "test_multiple_adapters_no_needless_copy_modules_to_save",
    "test_multiple_adapters_seq_cls_mixed_modules_to_save_merging_adapters",
}

# Imported by PEFT's test modules, but not used by the selected tests.
for package, name in (("diffusers", "StableDiffusionPipeline"), ("datasets", "load_dataset")):
    if find_spec(package) is None:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__spec__ = ModuleSpec(package, None)
        setattr(sys.modules[package], name, None)

prepared = []  # adapters of the current test that ipa_hf initialized
trainable = []  # not empty if the current test needs a trainable A
loading = []
passed, skipped = [], {}


def batches():
    """Return inputs of the shape that PEFT's custom models take."""
    generator = torch.Generator().manual_seed(0)
    return [{"X": torch.randint(90, (9, 10), generator=generator)} for _ in range(4)]


def runs(base):
    """Return whether the model is a custom model of PEFT's tests that takes these inputs."""
    kind = type(base)
    # DeepMLP does not run; models defined within a test take other inputs.
    custom = kind.__module__.endswith("test_custom_models") and "<locals>" not in kind.__qualname__
    return custom and kind.__name__ != "DeepMLP"


def forward(model, batch):
    """Run a model in the dtype of its weights, which some of PEFT's models do not track."""
    known = vars(model).get("dtype")
    try:
        if known is not None:
            model.dtype = next(model.parameters()).dtype
        model(**batch)
    finally:
        if known is not None:
            model.dtype = known


def prepare(model, adapter):
    """Initialize an adapter by ipa_hf, but keep the B that PEFT gave it."""
    config = model.peft_config[adapter]
    base = model.get_base_model()
    if loading or not runs(base) or not isinstance(config, LoraConfig):
        return
    layers = {
        name: layer
        for name, layer in lora_layers(model, adapter).items()
        if takes_projection(layer, adapter)
    }
    init = config.init_lora_weights
    lora_B = {name: lora_A_and_B(layer, adapter)[1] for name, layer in layers.items()}
    kept = {name: b.detach().clone() for name, b in lora_B.items()}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if init is False:
                config.init_lora_weights = True
                for b in lora_B.values():
                    b.zero_()
            ipa_hf.initialize_lora_ipa_weights(
                model,
                batches(),
                adapter_name=adapter,
                trainable=bool(trainable),
                on_missing="warn",
                progress=False,
                forward=forward,
            )
        prepared.append(adapter)
    except IPAError as error:
        skipped[str(error)] = skipped.get(str(error), 0) + 1
    finally:
        model.peft_config[adapter].init_lora_weights = init
        with torch.no_grad():
            for name, b in lora_B.items():
                b.copy_(kept[name])


def prepared_model(*args, **kwargs):
    """Call `peft.get_peft_model` and initialize the adapter by ipa_hf."""
    model = _get_peft_model(*args, **kwargs)
    if isinstance(model, PeftModel):
        prepare(model, model.active_adapter)
    return model


_get_peft_model = peft.get_peft_model
_add_adapter, _load_adapter = PeftModel.add_adapter, PeftModel.load_adapter


@wraps(_add_adapter)
def add_adapter(self, adapter_name, *args, **kwargs):
    result = _add_adapter(self, adapter_name, *args, **kwargs)
    prepare(self, adapter_name)
    return result


@wraps(_load_adapter)
def load_adapter(self, *args, **kwargs):
    loading.append(self)
    try:
        return _load_adapter(self, *args, **kwargs)
    finally:
        loading.pop()


def pytest_configure(config):
    peft.get_peft_model = prepared_model
    PeftModel.add_adapter, PeftModel.load_adapter = add_adapter, load_adapter


def pytest_collection_modifyitems(config, items):
    items[:] = [item for item in items if _is_kept(item)]


def _is_kept(item):
    values = getattr(getattr(item, "callspec", None), "params", {})
    kinds = [
        values[name] for name in ("config_cls", "config0", "config1", "config") if name in values
    ]
    lora = all(kind is LoraConfig or isinstance(kind, LoraConfig) for kind in kinds)
    return lora and item.originalname not in HUB and any(x in item.originalname for x in KEPT)


def pytest_runtest_setup(item):
    prepared.clear()
    trainable[:] = [item] if item.cls and item.cls.__name__ == "TestRequiresGrad" else []


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    report = (yield).get_result()
    if report.when == "call" and report.passed and prepared:
        passed.append(item.nodeid)


def pytest_terminal_summary(terminalreporter):
    for reason, count in skipped.items():
        terminalreporter.write_line(f"initialized by LoRA, {count}: {reason}")
    terminalreporter.write_line(f"passed on models prepared by ipa_hf: {len(passed)}")
