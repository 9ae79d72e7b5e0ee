"""The portable form of an adapter, which every server of LoRA adapters reads alike."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from safetensors.torch import save_file

from ipa_core.errors import SettingError
from ipa_hf.lora_layers import adapted_layers, lora_A_and_B, lora_config, takes_projection

_Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class _Common:
    """What the portable form has once for the whole model."""

    rank: int
    alpha: int

    @property
    def scaling(self) -> float:
        return self.alpha / self.rank


def export_lora(
    peft_model: PeftModel,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
) -> None:
    r"""Write an adapter in the one form of LoRA that all servers compute alike.

    Servers differ in what they ignore: patterns of ranks and alphas, rsLoRA, prefixes of targets.
    Here every layer has one rank (A is padded with rows and B with columns of zeros, which changes
    nothing) and one whole alpha (what a layer's own scaling has more or less goes into B, so that
    layers that share P keep equal A); targets are bare names. PEFT loads it, too.

    Parameters
    ----------
    peft_model : PeftModel
        Not changed.
    directory : path-like
        Made if it is not there. Gets ``adapter_model.safetensors``, ``adapter_config.json`` and,
        where the model has one, the record of how the adapter began.
    adapter_name : str, default "default"
        The adapter; always written as the only one.

    Raises
    ------
    SettingError
        If there is something that servers cannot load: DoRA, trained biases, whole modules,
        adapters of other layers than linear ones. The message says what to do.

    Notes
    -----
    Memory and disk: (d_in + d_out) times the largest rank for each layer, and as much again for
    layers that have a target's name without being adapted: they are written as zeros.

    Examples
    --------
    >>> import json, pathlib, tempfile
    >>> from peft import LoraConfig, get_peft_model
    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> llama = LlamaForCausalLM(LlamaConfig(vocab_size=16, **size))
    >>> lora = LoraConfig(r=2, rank_pattern={"q_proj": 4}, target_modules=["q_proj", "v_proj"])
    >>> model = get_peft_model(llama, lora)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     export_lora(model, folder)
    ...     config = json.loads((pathlib.Path(folder) / "adapter_config.json").read_text())
    >>> config["r"], config["rank_pattern"], sorted(config["target_modules"])
    (4, {}, ['q_proj', 'v_proj'])
    """
    config = lora_config(peft_model, adapter_name)
    layers = adapted_layers(peft_model, adapter_name)
    _check_servable(config, layers, adapter_name)
    common = _common(layers, adapter_name)
    tensors = {
        f"base_model.model.{name}.lora_{part}.weight": tensor
        for name, pair in _pairs(peft_model, layers, common, adapter_name).items()
        for part, tensor in zip("AB", pair, strict=True)
    }
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    _portable(peft_model, config, layers, common).save_pretrained(str(folder))
    if record := getattr(config, "record", None):
        record.write(folder)


def _check_servable(config: LoraConfig, layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
    unwanted = {
        "use_dora": config.use_dora,
        "lora_bias": config.lora_bias,
        "bias": config.bias != "none",
        "modules_to_save": config.modules_to_save,
        "trainable_token_indices": config.trainable_token_indices,
    }
    if held := sorted(name for name, value in unwanted.items() if value):
        raise SettingError(
            f"expected an adapter of matrices A and B only, which servers can load, got {held}; "
            "serve the model of merge_and_unload() instead, or train without them"
        )
    for name, layer in layers.items():
        if not takes_projection(layer, adapter_name):
            raise SettingError(
                f"layer {name!r}: expected a linear layer, which servers can adapt, got "
                f"{type(layer.get_base_layer()).__name__}; serve the model of merge_and_unload()"
            )


def _common(layers: Mapping[str, LoraLayer], adapter_name: str) -> _Common:
    rank = max(layer.r[adapter_name] for layer in layers.values())
    counted = Counter(layer.scaling[adapter_name] for layer in layers.values())
    usual, _ = counted.most_common(1)[0]
    # Whole: some servers declare it an integer.
    return _Common(rank, max(1, round(usual * rank)))


def _pairs(
    peft_model: PeftModel, layers: Mapping[str, LoraLayer], common: _Common, adapter_name: str
) -> dict[str, _Pair]:
    """Return A and B by layer, for all layers that loading by bare names will find."""
    found = {}
    bare = {_bare(name) for name in layers}
    for name, module in peft_model.get_base_model().named_modules():
        if name in layers:
            found[name] = _padded(layers[name], common, adapter_name)
        elif _bare(name) in bare and ".base_layer" not in name:
            found[name] = _zeros(name, module, common)
    return found


def _padded(layer: LoraLayer, common: _Common, adapter_name: str) -> _Pair:
    a, b = (matrix.detach() for matrix in lora_A_and_B(layer, adapter_name))
    missing = common.rank - a.shape[0]
    a = torch.nn.functional.pad(a, (0, 0, 0, missing))
    b = torch.nn.functional.pad(b, (0, missing))
    ratio = layer.scaling[adapter_name] / common.scaling
    return a.contiguous(), (b if ratio == 1 else ratio * b).contiguous()


def _zeros(name: str, module: torch.nn.Module, common: _Common) -> _Pair:
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if isinstance(base, torch.nn.Linear):
        features, out = base.in_features, base.out_features
    elif type(base).__name__ == "Conv1D":
        features, out = base.get_parameter("weight").shape
    else:
        raise SettingError(
            f"layer {name!r}: expected every layer of a target's bare name to be linear, got "
            f"{type(base).__name__}; serve the model of merge_and_unload()"
        )
    return torch.zeros(common.rank, features), torch.zeros(out, common.rank)


def _portable(
    peft_model: PeftModel, config: LoraConfig, layers: Mapping[str, LoraLayer], common: _Common
) -> LoraConfig:
    base = peft_model.get_base_model()
    return LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path
        or getattr(base, "name_or_path", None)
        or None,
        r=common.rank,
        lora_alpha=common.alpha,
        target_modules=sorted({_bare(name) for name in layers}),
        fan_in_fan_out=config.fan_in_fan_out,
        inference_mode=True,
    )


def _bare(name: str) -> str:
    return name.rpartition(".")[2]
