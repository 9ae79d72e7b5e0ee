"""A pytest plugin for PEFT's own tests: the models that they make are prepared by ipa_hf.

Of the tests of custom models, those on LoRA are kept whose names say what `KEPT` lists. Whatever
LoRA adapter they add to a model is begun again with projections of the model's inputs, held
fixed; where a test asks for a B that is not zero, it stays. `tests/hf/test_peft_suite.py` runs it.
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
from ipa_hf.lora_layers import adapted_layers, lora_A_and_B, takes_projection

KEPT = ("save", "load", "merge", "mixed", "disable", "delete")
HUB = {  # their models are on a hub
    "test_delete_adapter_multiple_adapters_with_trainable_token_indices",
    "test_dora_save_and_load_remapping",
    "test_gpt2_dora_merge_and_unload",
    "test_gpt2_dora_merge_and_unload_safe_merge",
    "test_multiple_adapters_automatic_modules_to_save",
    "test_multiple_adapters_no_needless_copy_modules_to_save",
    "test_multiple_adapters_seq_cls_mixed_modules_to_save_merging_adapters",
}

# Imported by PEFT's tests, and not used by these.
for package, name in (("diffusers", "StableDiffusionPipeline"), ("datasets", "load_dataset")):
    if find_spec(package) is None:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__spec__ = ModuleSpec(package, None)
        setattr(sys.modules[package], name, None)

prepared = []  # adapters, in the present test
trainable = []  # not empty where the present test wants an A with gradients
loading = []
passed, left = [], {}


def batches():
    """Return inputs of the shape that PEFT's tests feed their models."""
    generator = torch.Generator().manual_seed(0)
    return [{"X": torch.randint(90, (9, 10), generator=generator)} for _ in range(4)]


def runs(base):
    """Return whether a model is one of PEFT's own custom ones, and takes such inputs."""
    kind = type(base)
    # DeepMLP cannot run at all; those made within a test take inputs of their own.
    own = kind.__module__.endswith("test_custom_models") and "<locals>" not in kind.__qualname__
    return own and kind.__name__ != "DeepMLP"


def forward(model, batch):
    """Run a model in the dtype of its weights, of which PEFT's do not all know."""
    known = vars(model).get("dtype")
    try:
        if known is not None:
            model.dtype = next(model.parameters()).dtype
        model(**batch)
    finally:
        if known is not None:
            model.dtype = known


def prepare(model, adapter):
    """Begin an adapter again, with the B that PEFT gave it."""
    config = model.peft_config[adapter]
    base = model.get_base_model()
    if loading or not runs(base) or not isinstance(config, LoraConfig):
        return
    layers = {
        name: layer
        for name, layer in adapted_layers(model, adapter).items()
        if takes_projection(layer, adapter)
    }
    wanted = config.init_lora_weights
    lora_B = {name: lora_A_and_B(layer, adapter)[1] for name, layer in layers.items()}
    kept = {name: lift.detach().clone() for name, lift in lora_B.items()}
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if wanted is False:
                config.init_lora_weights = True
                for lift in lora_B.values():
                    lift.zero_()
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
        left[str(error)] = left.get(str(error), 0) + 1
    finally:
        model.peft_config[adapter].init_lora_weights = wanted
        with torch.no_grad():
            for name, lift in lora_B.items():
                lift.copy_(kept[name])


def prepared_model(*args, **kwargs):
    """Do as `peft.get_peft_model` does, and prepare the adapter."""
    model = _get_peft_model(*args, **kwargs)
    if isinstance(model, PeftModel):
        prepare(model, model.active_adapter)
    return model


_get_peft_model = peft.get_peft_model
_add_adapter, _load_adapter = PeftModel.add_adapter, PeftModel.load_adapter


@wraps(_add_adapter)
def add_adapter(self, adapter_name, *args, **kwargs):
    done = _add_adapter(self, adapter_name, *args, **kwargs)
    prepare(self, adapter_name)
    return done


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
    for reason, count in left.items():
        terminalreporter.write_line(f"begun as LoRA, {count}: {reason}")
    terminalreporter.write_line(f"passed on models prepared by ipa_hf: {len(passed)}")
