"""Export of an adapter with one rank and one alpha, for inference servers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import save as to_bytes
from transformers import AutoConfig

from ipa_core.errors import SettingError
from ipa_core.io.atomic_write import replace_file
from ipa_core.io.paths import output_folder
from ipa_hf.adapter_config_file import write_lora_config
from ipa_hf.adapter_holder import base_model
from ipa_hf.adapter_metadata import write_metadata
from ipa_hf.export_check import ServedModel, check_layer_names
from ipa_hf.export_experts import export_experts
from ipa_hf.export_rank import LoraPair, UniformSize
from ipa_hf.lora_config import KEEPING_BASE_WEIGHTS, PLAIN_LORA, lora_config, unsupported_fields
from ipa_hf.lora_layers import lora_A_and_B, lora_layers, takes_projection
from ipa_torch.extension import features_of, is_conv1d, outputs_of, unwrap_model

#: Layers that vLLM and SGLang compute as one; SGLang needs an adapter for each or for none.
_STACKS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def export_lora(
    peft_model: torch.nn.Module,
    directory: str | os.PathLike[str],
    *,
    adapter_name: str = "default",
    check: ServedModel | None = None,
) -> None:
    r"""Write an adapter in the subset of PEFT's format that all inference servers support.

    Servers ignore different parts of a LoRA configuration: ``rank_pattern``, ``alpha_pattern``,
    rsLoRA, prefixes of target names. The exported adapter needs none of them. All layers have the
    same rank (A is padded with zero rows, B with zero columns), the same integer alpha (any other
    scaling of a layer is multiplied into its B, so that layers that share P keep equal A), and
    targets are the last components of layer names. Servers that stack q, k and v or gate and up
    need all layers of a stack: the missing ones are written with B of zeros. PEFT loads the
    exported adapter too.

    Parameters
    ----------
    peft_model : torch.nn.Module
        A `PeftModel`, or a model that holds PEFT's adapters; left unchanged.
    directory : path-like
        Created if missing. Receives ``adapter_model.safetensors``, ``adapter_config.json`` and, if
        the adapter has metadata, ``ipa_adapter.json``.
    adapter_name : str, default "default"
        The adapter to export.
    check : torch.nn.Module or class, optional
        The model as it will be served, or its class: nothing is written if it has none of the
        adapter's layers under their names, as for the text model's adapter in a multimodal model.
        A class of transformers is built on the meta device from the base model's configuration;
        for another configuration, pass a model built under ``torch.device("meta")``.

    Raises
    ------
    SettingError
        If ``check`` finds no layer of the adapter. If the adapter has parts that servers cannot
        load: fields of its configuration beyond plain LoRA (DoRA, trained biases, whole modules,
        aLoRA ...; the message names them), layers that are not linear, or embeddings of another
        size than those of the saved base model.

    Warns
    -----
    UserWarning
        If ``check`` finds only some of the layers: the others are named.

    Notes
    -----
    Memory and disk: (d_in + d_out) times the largest rank for each layer, including layers that
    have a target's name, or the name of a layer stacked with it, but no adapter, which are written
    as zeros.

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
    (4, {}, ['k_proj', 'q_proj', 'v_proj'])
    """
    config = lora_config(peft_model, adapter_name)
    layers = lora_layers(peft_model, adapter_name)
    _check_servable(config, layers, adapter_name)
    _check_vocabulary(peft_model)
    size = UniformSize.of(layers.values(), adapter_name)
    fused = {name: x for name, x in layers.items() if isinstance(x, ParamWrapper)}
    linear = {name: x for name, x in layers.items() if name not in fused}
    experts = export_experts(unwrap_model(base_model(peft_model)), fused, size, adapter_name)
    weights = _linear_weights(peft_model, linear, size, adapter_name)
    if check is not None:
        names = [*weights, *{name.rpartition(".")[0] for name in fused}]
        check_layer_names(names, check, base_model(peft_model))
    pairs = weights | experts.pairs
    tensors = {
        f"base_model.model.{name}.lora_{part}.weight": tensor
        for name, pair in pairs.items()
        for part, tensor in zip("AB", pair, strict=True)
    }
    folder = output_folder(directory)
    replace_file(folder / "adapter_model.safetensors", to_bytes(tensors, {"format": "pt"}))
    targets = _exported_targets(peft_model, linear) | experts.target_modules
    exported = _export_config(
        peft_model, config, size, sorted(targets), sorted(experts.target_parameters)
    )
    write_lora_config(exported, folder)
    write_metadata(peft_model, adapter_name, folder)


def _check_servable(config: LoraConfig, layers: Mapping[str, LoraLayer], adapter_name: str) -> None:
    used = unsupported_fields(config, PLAIN_LORA)
    if config.init_lora_weights not in KEEPING_BASE_WEIGHTS:
        used = ["init_lora_weights", *used]
    if used:
        raise SettingError(
            f"expected an adapter with matrices A and B only, got {used}; servers cannot load it; "
            "serve the model of merge_and_unload() instead, or train without them"
        )
    for name, layer in layers.items():
        if not takes_projection(layer, adapter_name):
            raise SettingError(
                f"layer {name!r}: expected a linear layer, got "
                f"{type(layer.get_base_layer()).__name__}; servers cannot "
                "load its adapter; serve the model of merge_and_unload()"
            )


def _check_vocabulary(peft_model: torch.nn.Module) -> None:
    """Check that the embeddings have the size of the saved base model, which a server loads."""
    base: Any = unwrap_model(base_model(peft_model))
    try:
        embedding = getattr(base, "get_input_embeddings", lambda: None)()
    except NotImplementedError:
        return  # a model of several towers, without a single vocabulary
    source = getattr(base, "name_or_path", "")
    if not (source and isinstance(embedding, torch.nn.Embedding)):
        return
    try:
        saved = AutoConfig.from_pretrained(source, local_files_only=True).get_text_config()
    except (OSError, ValueError):
        return  # a model whose files are not here any more, or of a type of its own
    expected = getattr(saved, "vocab_size", None)
    # Not the rows of the table: some checkpoints pad it beyond the vocabulary.
    current = getattr(base.config.get_text_config(), "vocab_size", None)
    if expected is not None and current != expected:
        raise SettingError(
            f"expected the {expected} embeddings of the base model in {source!r}, got "
            f"{current} after a resize; save the resized base model with "
            "save_pretrained, load it from there, and export the adapter over it"
        )


def _linear_weights(
    peft_model: torch.nn.Module,
    layers: Mapping[str, LoraLayer],
    size: UniformSize,
    adapter_name: str,
) -> dict[str, LoraPair]:
    """Return A and B of all layers whose last name component is a target."""
    pairs = {}
    targets = _exported_targets(peft_model, layers)
    for name, module in unwrap_model(base_model(peft_model)).named_modules():
        if name in layers:
            a, b = lora_A_and_B(layers[name], adapter_name)
            pairs[name] = size.pad(a, b, layers[name].scaling[adapter_name])
        elif _last_component(name) in targets and ".base_layer" not in name:
            pairs[name] = _zeros(name, module, size)
    for name in pairs.keys() - layers.keys():
        pairs[name] = _with_A_of_its_stack(name, pairs, layers)
    return pairs


def _with_A_of_its_stack(
    name: str, pairs: Mapping[str, LoraPair], layers: Mapping[str, LoraLayer]
) -> LoraPair:
    """Return A of a layer that is stacked with this one, and B of zeros.

    llama.cpp computes the adapters of a stack as one where all have the same A.
    """
    a, b = pairs[name]
    parent, _, target = name.rpartition(".")
    stack = next((stack for stack in _STACKS if target in stack), ())
    for partner in (f"{parent}.{other}".lstrip(".") for other in stack):
        if partner in layers and pairs[partner][0].shape == a.shape:
            return pairs[partner][0].clone(), b.to(pairs[partner][1].dtype)
    return a, b


def _zeros(name: str, module: torch.nn.Module, size: UniformSize) -> LoraPair:
    base = module.get_base_layer() if isinstance(module, LoraLayer) else module
    if not (isinstance(base, torch.nn.Linear) or is_conv1d(base)):
        raise SettingError(
            f"layer {name!r}: expected a linear layer, as its last name component is a target, got "
            f"{type(base).__name__}; serve the model of merge_and_unload()"
        )
    return size.zeros(features_of(base), outputs_of(base))


def _export_config(
    peft_model: torch.nn.Module,
    config: LoraConfig,
    size: UniformSize,
    modules: list[str],
    parameters: list[str],
) -> LoraConfig:
    base = base_model(peft_model)
    return LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path
        or getattr(base, "name_or_path", None)
        or None,
        r=size.rank,
        lora_alpha=size.alpha,
        target_modules=modules,
        target_parameters=parameters or None,
        fan_in_fan_out=config.fan_in_fan_out,
        inference_mode=True,
    )


def _exported_targets(peft_model: torch.nn.Module, layers: Mapping[str, LoraLayer]) -> set[str]:
    """Return the last name components of the layers, and of those that servers stack with them."""
    targets = {_last_component(name) for name in layers}
    modules = dict(unwrap_model(base_model(peft_model)).named_modules())
    for name in layers:
        parent, _, target = name.rpartition(".")
        for stack in _STACKS:
            if target in stack:
                targets |= {x for x in stack if f"{parent}.{x}".lstrip(".") in modules}
    return targets


def _last_component(name: str) -> str:
    return name.rpartition(".")[2]
