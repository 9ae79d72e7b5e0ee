"""Pytest plugin that runs PEFT's tests of EVA with the projections of ipa_hf in EVA's place.

PEFT keeps these tests for machines with a GPU and downloads GPT-2 and quotes. Here they run on a
CPU, on a small random GPT-2, tokens that are bytes, and lines of PEFT's README.
`tests/hf/test_peft_suite.py` runs the plugin.
"""

import copy
import random
import sys
import warnings
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace

import accelerate.test_utils.testing as accelerate_testing
import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer

import ipa_hf
from ipa_core.errors import EmptyStreamError
from ipa_torch import attention_mask

OTHERS = ("test_eva_state_dict_prepare_inputs_mapping",)  # an option that ipa_hf does not have
MISSING = "keep LoRA's random A, as they have no projector"


class Dataset:
    """The few methods of `datasets.Dataset` that the tests call."""

    def __init__(self, columns, as_tensors=False):
        self.columns, self.as_tensors = columns, as_tensors

    @classmethod
    def from_dict(cls, columns):
        return cls(dict(columns))

    @property
    def column_names(self):
        return list(self.columns)

    def __len__(self):
        return len(next(iter(self.columns.values())))

    def __getitem__(self, index):
        row = {name: column[index] for name, column in self.columns.items()}
        return {k: torch.as_tensor(v) for k, v in row.items()} if self.as_tensors else row

    def map(self, function, batched=False, remove_columns=()):
        if batched:
            added = dict(function(self.columns))
        else:
            rows = [function(self[i]) for i in range(len(self))]
            added = {name: [row[name] for row in rows] for name in rows[0]}
        kept = {k: v for k, v in self.columns.items() if k not in remove_columns}
        return Dataset(kept | added)

    def set_format(self, type):
        self.as_tensors = type == "torch"

    def shuffle(self, seed):
        order = random.Random(seed).sample(range(len(self)), len(self))
        shuffled = {name: [column[i] for i in order] for name, column in self.columns.items()}
        return Dataset(shuffled, self.as_tensors)


def small_gpt2(*args, **kwargs):
    """Return GPT-2 with random weights, for `from_pretrained`."""
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=384, n_positions=256, n_embd=64, n_head=2)
    return transformers.GPT2LMHeadModel(config).eval()


def quotes(*args, **kwargs):
    """Return lines of PEFT's README as the data set."""
    lines = Path("README.md").read_text(encoding="utf-8").splitlines()
    return {"train": [{"quote": line} for line in lines if line]}


def label_mask(batch):
    """Return the mask of EVA's `use_label_mask`: of labels where there are any."""
    return ipa_hf.causal_label_mask(batch) if "labels" in batch else attention_mask(batch)


def initialize(model, dataloader=None, eva_state_dict=None, **kwargs):
    """Initialize by ipa_hf, with the words of PEFT for what is missing."""
    if eva_state_dict is not None:  # projections that were learned by `state_dict`
        return _initialize(model, eva_state_dict=eva_state_dict)
    config = model.peft_config["default"]
    masks = {"row_weights": label_mask} if config.eva_config.use_label_mask else {}
    config.init_lora_weights = True  # "eva" is refused by name
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ipa_hf.initialize_lora_ipa_weights(model, dataloader, progress=False, **masks)
    except EmptyStreamError as error:
        raise ValueError("dataloader is empty") from error
    finally:
        config.init_lora_weights = "eva"
    if any(MISSING in str(warning.message) for warning in caught):
        warnings.warn(
            "the following layers were initialized with init_lora_weights=True because they were "
            "not found in the eva state_dict",
            stacklevel=2,
        )


def state_dict(model, dataloader, peft_config=None, **kwargs):
    """Return A by the names that `get_eva_state_dict` uses; the model is left as it is."""
    copied = copy.deepcopy(model)
    prefix = "" if peft_config else "base_model.model."
    if peft_config:
        copied = peft.get_peft_model(copied, peft_config)
    initialize(copied, dataloader)
    return {
        prefix + name: module.lora_A["default"].weight.detach()
        for name, module in copied.get_base_model().named_modules()
        if isinstance(module, LoraLayer)
    }


_initialize = peft.initialize_lora_eva_weights


def _stub(package, **names):
    if find_spec(package) is None:
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__spec__ = ModuleSpec(package, None)
    for name, value in names.items():
        setattr(sys.modules.get(package) or __import__(package), name, value)


def pytest_configure(config):
    accelerate_testing.get_backend = lambda: ("cuda", 1, None)  # else the module skips itself
    unused = dict.fromkeys(("Audio", "DatasetDict"))
    _stub("datasets", Dataset=Dataset, load_dataset=quotes, **unused)
    _stub("parameterized", parameterized=SimpleNamespace(expand=lambda cases: lambda test: test))
    transformers.AutoTokenizer = SimpleNamespace(
        from_pretrained=lambda name: transformers.ByT5Tokenizer()
    )
    transformers.AutoModelForCausalLM = SimpleNamespace(from_pretrained=small_gpt2)
    peft.get_eva_state_dict, peft.initialize_lora_eva_weights = state_dict, initialize


def pytest_collection_modifyitems(config, items):
    items[:] = [item for item in items if item.originalname not in OTHERS]
    for item in items:
        quantized = "model_bnb" in item.name
        item.own_markers = [m for m in item.own_markers if quantized or "skip" not in m.name]
        item.parent.own_markers = []
