"""Hostile values for the public callables: only errors of the library leave them.

Errors raised within what a caller passes, such as a model that is given batches, pass through.
"""

import inspect
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralModel

import ipa_hf
from ipa_core import IPAError, SettingError
from ipa_core.errors import FileFormatError, MissingFileError, PathError, ShapeError
from ipa_hf import adapter_holder, adapter_metadata
from ipa_torch import fit_projectors
from tests.hostile_values import Opaque

TARGETS = ["q_proj", "v_proj"]
BATCHES = [{"input_ids": torch.arange(16).reshape(2, 8)}]
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}


def llama(hidden_size=8):
    torch.manual_seed(0)
    size = {"hidden_size": hidden_size, "intermediate_size": 8, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(vocab_size=16, **size, **HEADS))


def mixtral():
    size = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "vocab_size": 16}
    return MixtralModel(MixtralConfig(**size, **HEADS, num_local_experts=2))


def config(**fields):
    return LoraConfig(**{"r": 2, "target_modules": TARGETS} | fields)


PROJECTORS = fit_projectors(llama(), BATCHES, 2, targets=TARGETS, progress=False)


VALUES = [
    None,
    0,
    1.5,
    float("nan"),
    np.ones((4, 5), "float32"),
    np.array([None], dtype=object),
    "",
    "../a",
    "a\0b",
    "[",
    b"bytes",
    {},
    [None],
    {"a": 1},
    {1: next(iter(PROJECTORS.values()))},
    [*PROJECTORS.values()],
    BATCHES[0],
    iter(()),
    Opaque(),
    torch.ones(3, 5),
    torch.ones(3, 8, device="meta"),
    IA3Config(target_modules=["q_proj"], feedforward_modules=[]),
    int,
    nn.Linear,
    nn.Linear(3, 2),
]


def model(**options):
    settings = {"model": llama(), "config": config(), "data": PROJECTORS} | options
    return ipa_hf.get_ipa_model(**settings)


def initialize(**options):
    settings = {"peft_model": get_peft_model(llama(), config()), "data": PROJECTORS} | options
    return ipa_hf.initialize_lora_ipa_weights(**settings)


def share(**options):
    settings = {"model": llama(), "projectors": PROJECTORS, "names": ["first"]} | options
    return ipa_hf.share(**settings)


def experts(**options):
    settings = {"model": mixtral(), "targets": ["experts.down_proj"]} | options
    with ipa_hf.expert_layers(**settings) as names:
        return names


MODEL, SHARED = model(), share(names=["first", "second"])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    MODEL.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def saved_shared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared")
    ipa_hf.save_shared(SHARED, folder)
    return folder


CALLS = {
    "model": lambda x: model(model=x),
    "model config": lambda x: model(config=x),
    "model data": lambda x: model(data=x if isinstance(x, dict) else None),
    "model adapter_name": lambda x: model(adapter_name=x),
    "model trainable": lambda x: model(trainable=x),
    "model scaling": lambda x: model(scaling=x),
    "model on_missing": lambda x: model(on_missing=x),
    "model expert_sharing": lambda x: model(expert_sharing=x),
    "model routing_weights": lambda x: model(routing_weights=x),
    "initialize": lambda x: initialize(peft_model=x),
    "initialize adapter_name": lambda x: initialize(adapter_name=x),
    "freeze": ipa_hf.freeze_projections,
    "freeze adapter_name": lambda x: ipa_hf.freeze_projections(MODEL, x),
    "freeze layers": lambda x: ipa_hf.freeze_projections(MODEL, layers=x),
    "ranks config": lambda x: ipa_hf.match_ranks(x, PROJECTORS),
    "ranks projectors": lambda x: ipa_hf.match_ranks(config(), x),
    "share model": lambda x: share(model=x),
    "share projectors": lambda x: share(projectors=x),
    "share names": lambda x: share(names=x),
    "share config": lambda x: share(config=x),
    "save_shared": lambda x: ipa_hf.save_shared(x, "folder"),
    "save_shared directory": lambda x: ipa_hf.save_shared(SHARED, x),
    "save_shared names": lambda x: ipa_hf.save_shared(SHARED, "folder", x),
    "load_shared directory": lambda x: ipa_hf.load_shared(llama(), x),
    "load_adapter directory": lambda x: ipa_hf.load_adapter(llama(), x),
    "export_lora": lambda x: ipa_hf.export_lora(x, "folder"),
    "export_lora directory": lambda x: ipa_hf.export_lora(MODEL, x),
    "export_lora adapter_name": lambda x: ipa_hf.export_lora(MODEL, "folder", adapter_name=x),
    "export_lora check": lambda x: ipa_hf.export_lora(MODEL, "folder", check=x),
    "default_targets": ipa_hf.default_targets,
    "target_coverage": lambda x: ipa_hf.target_coverage(x, ".*"),
    "target_coverage targets": lambda x: ipa_hf.target_coverage(llama(), x),
    "expert_layers": lambda x: experts(model=x),
    "expert_layers targets": lambda x: experts(targets=x),
    "expert_layers sharing": lambda x: experts(sharing=x),
    "expert_layers routing_weights": lambda x: experts(routing_weights=x),
    "OnlineCallback": ipa_hf.OnlineCallback,
    "causal_label_mask": ipa_hf.causal_label_mask,
    "without_first_token": ipa_hf.without_first_token,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", CALLS)
def test_only_errors_of_the_library(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")  # "../a" stays within the temporary folder
    for value in VALUES:
        try:
            CALLS[name](value)
        except IPAError as error:
            assert "got" in str(error)


@pytest.mark.parametrize("field", ["trainable", "routing_weights"])
def test_text_and_numbers_are_no_switches(field):
    for value in ("False", 0, None):
        with pytest.raises(SettingError, match=f"expected {field} to be True or False"):
            model(**{field: value})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"lora_alpha": float("nan")}, "lora_alpha .*finite number other than 0"),
        ({"lora_alpha": 0}, "lora_alpha .*finite number other than 0"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "alpha_pattern\\['q_proj'\\]"),
        ({"lora_dropout": True}, "dropout"),
        ({"lora_dropout": -1}, "dropout"),
        ({"use_rslora": "no"}, "use_rslora"),
        ({"r": "2"}, "r of the LoraConfig"),
        ({"init_lora_weights": torch.ones(2)}, "init_lora_weights=True"),
        ({"target_modules": "["}, "name other layers in target_modules"),
        ({"exclude_modules": (name for name in ["a"])}, "pass names as a list"),
    ],
)
def test_fields_of_the_configuration(fields, message):
    for call in (model, lambda config: share(config=config)):
        with pytest.raises(SettingError, match=message):
            call(config=config(**fields))


def unchanged(tested, action, error, match):
    """Check that a refused action leaves the modules, flags and adapters of a model."""
    adapters = [*getattr(tested, "peft_config", ())]
    modules = [*tested.named_modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in tested.parameters()]
    with pytest.raises(error, match=match):
        action(tested)
    assert [*getattr(tested, "peft_config", ())] == adapters
    assert [*tested.named_modules()] == modules
    assert all(parameter.requires_grad is flag for parameter, flag in flags)


def test_a_second_injection_is_refused():
    # PEFT would overwrite the adapter of this name, or wrap its layers.
    for name in ("default", "second"):
        unchanged(
            model(),
            lambda x, name=name: model(model=x, adapter_name=name),
            SettingError,
            "add another with add_adapter",
        )
    held = llama()
    held.add_adapter(config())
    for call in (lambda x: model(model=x), lambda x: share(model=x)):
        unchanged(held, call, SettingError, "expected a model without adapters")


def test_an_adapter_is_not_loaded_over_another(saved):
    # Its weights would be used under the scaling of the old one.
    unchanged(
        model(),
        lambda x: ipa_hf.load_adapter(x, saved),
        SettingError,
        "name of a new adapter, got 'default'",
    )


def damaged(source, folder, name, content):
    shutil.copytree(source, folder)
    data = (folder / name).read_bytes()
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(data[:-20] if content == "cut" else content.encode())
    return folder


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("content", [None, "cut", "", "[]", "{}", "[" * 100_000])
@pytest.mark.parametrize(
    "name", ["adapter_config.json", "adapter_model.safetensors", "ipa_adapter.json"]
)
def test_damaged_adapters_leave_the_model(saved, tmp_path, name, content):
    folder = damaged(saved, tmp_path / "damaged", name, content)
    error = (FileFormatError, MissingFileError, SettingError)
    other = ipa_hf.get_ipa_model(
        llama(), config(target_modules=["o_proj"]), BATCHES, progress=False
    )
    unchanged(llama(), lambda x: ipa_hf.load_adapter(x, folder), error, "expected")
    unchanged(
        other, lambda x: ipa_hf.load_adapter(x, folder, adapter_name="next"), error, "expected"
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("content", [None, "cut", "", "[" * 100_000])
@pytest.mark.parametrize("name", ["lora_A.safetensors", "second/adapter_config.json"])
def test_damaged_shared_adapters_leave_the_model(saved_shared, tmp_path, name, content):
    folder = damaged(saved_shared, tmp_path / "damaged", name, content)
    error = (FileFormatError, MissingFileError)
    unchanged(llama(), lambda x: ipa_hf.load_shared(x, folder), error, "expected")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("rank", 2.0),
        ("rank", 0),
        ("samples", 9.0),
        ("samples", -1),
        ("scale", float("nan")),
        ("captured", -0.5),
        ("captured", float("inf")),
    ],
)
def test_numbers_that_no_metadata_has(tmp_path, name, value):
    layer = adapter_metadata.LayerMetadata(rank=2, scale=1.0, captured=0.5, samples=9)
    adapter_metadata.AdapterMetadata(True, "energy", {"q": layer}).write(tmp_path)
    path = tmp_path / "ipa_adapter.json"
    content = json.loads(path.read_text())
    content["layers"]["q"][name] = value
    del content["sha256"]
    path.write_text(json.dumps(content | {"sha256": adapter_metadata._digest(content)}))
    with pytest.raises(FileFormatError, match=rf"ipa_adapter\.json: expected .*{name}"):
        adapter_metadata.AdapterMetadata.read(tmp_path)


@pytest.mark.filterwarnings("ignore")
def test_other_base_models_are_left(saved, saved_shared, tmp_path):
    ipa_hf.get_ipa_model(
        llama(), config(), BATCHES, trainable=True, progress=False
    ).save_pretrained(tmp_path)
    for folder in (saved, tmp_path):
        for other in (llama(hidden_size=16), nn.Sequential(nn.Linear(3, 2)), mixtral()):
            with pytest.raises(IPAError, match="load it into that model|that it was trained on"):
                ipa_hf.load_adapter(other, folder)
            assert not hasattr(other, "peft_config")
    unchanged(
        llama(hidden_size=16),
        lambda x: ipa_hf.load_shared(x, saved_shared),
        FileFormatError,
        "base model",
    )


def test_sharing_is_refused_before_the_first_adapter_is_added():
    joined = model()
    joined.add_adapter("other", config())  # of another, random A
    names = ["new", "other"]
    message = "expected adapters with the same A"
    unchanged(
        joined, lambda x: share(model=x, projectors="default", names=names), SettingError, message
    )


def test_masks_of_other_shapes():
    labels, mask = torch.ones(2, 8, dtype=torch.long), torch.ones(2, 8)
    for wrong in (labels.float(), labels.bool(), labels[0], labels.to(torch.complex64)):
        with pytest.raises(ShapeError, match="integer labels"):
            ipa_hf.causal_label_mask({"labels": wrong})
    for wrong in (mask[:, :5], mask[:1], mask.to("meta")):
        with pytest.raises(ShapeError, match="expected an attention_mask"):
            ipa_hf.causal_label_mask({"labels": labels, "attention_mask": wrong})
    for wrong in (labels.repeat(2, 1), labels[:, :5], labels.to("meta")):
        with pytest.raises(ShapeError, match="expected position_ids"):
            ipa_hf.without_first_token({"attention_mask": mask, "position_ids": wrong})


def test_folders_that_cannot_be_made(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    file = tmp_path / "file"
    file.write_text("content")
    for call in (ipa_hf.export_lora, ipa_hf.save_shared):
        for path in (file, file / "below", "/dev/null", ""):
            with pytest.raises(PathError, match="expected a (folder or a new name|path)"):
                call(SHARED if call is ipa_hf.save_shared else MODEL, path)
        call(SHARED if call is ipa_hf.save_shared else MODEL, "~/home")
    assert file.read_text() == "content"
    assert {path.name for path in Path(tmp_path / "home").iterdir()} > {"ipa_adapter.json"}


def test_one_batch_is_no_data():
    with pytest.raises(SettingError, match="got Tensor; pass batches in a list"):
        model(data=BATCHES[0])


def test_every_public_callable_is_tried():
    """A new public name has to join a table."""
    source = inspect.getsource(inspect.getmodule(llama))
    assert all(f"ipa_hf.{name}" in source for name in ipa_hf.__all__)


def test_a_part_of_the_model_may_have_adapters():
    parts = nn.ModuleDict({"left": nn.Linear(4, 4), "right": nn.Linear(4, 4)})
    other = get_peft_model(nn.Sequential(nn.Linear(4, 4)), LoraConfig(target_modules=["0"]))
    parts["other"] = other
    adapter_holder.check_without_adapters(parts, "no cure")
    with pytest.raises(SettingError, match="without adapters"):
        adapter_holder.check_without_adapters(other, "no cure")
