"""Initialize LoRA adapters of a PEFT model from projections of layer inputs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import LoraLayer, ParamWrapper

from ipa_core import Projector
from ipa_core.caller_warnings import warn_caller
from ipa_core.errors import SettingError
from ipa_core.settings import boolean
from ipa_hf.adapter_holder import check_without_adapters
from ipa_hf.adapter_injection import peft_errors, restored_on_error
from ipa_hf.adapter_metadata import AdapterMetadata, row_weights_name
from ipa_hf.adapter_names import check_adapter_name
from ipa_hf.block_coverage import warn_of_small_coverage
from ipa_hf.fit import fit_lora_projectors
from ipa_hf.freezing import Model, set_lora_A_frozen
from ipa_hf.fused_parameters import ExpertSharing
from ipa_hf.init_checks import check_fresh, check_initializable
from ipa_hf.layer_names import compact_names, layer_name
from ipa_hf.lora_config import copy_lora_config, lora_config
from ipa_hf.lora_layers import layer_kind, lora_layers, takes_projection
from ipa_hf.lora_slots import LoraSlot, find_projectors, lora_slots, truncate_to_slot, write_lora_A
from ipa_hf.offloaded_lora import materialize
from ipa_hf.renamed_keys import lost_on_loading
from ipa_hf.save_pretrained import keep_metadata
from ipa_hf.targets import default_targets
from ipa_torch import FitOptions, LayerError, attention_mask
from ipa_torch.extension import (
    NEVER_RAN,
    OnMissing,
    Scaling,
    check_choice,
    check_projectors,
    check_scaling,
)


def get_ipa_model(
    model: torch.nn.Module,
    config: LoraConfig,
    data: Iterable[Any] | Mapping[str, Projector],
    *,
    adapter_name: str = "default",
    trainable: bool = False,
    scaling: Scaling = "energy",
    expert_sharing: ExpertSharing = "never",
    routing_weights: bool = False,
    on_missing: OnMissing = "warn",
    **options: Unpack[FitOptions],
) -> PeftModel:
    r"""Return a PEFT model with LoRA adapters initialized from projections of the layers' inputs.

    Each layer with an adapter computes :math:`z = W x + \tfrac{\alpha}{r} B (s P) x`, where P is
    fitted to its inputs x, B = 0 initially, and s is a scalar. The adapter is an ordinary LoRA
    adapter with A = s P. Call this function before the optimizer is created.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers model, or any other module that `peft.get_peft_model` takes. Adapters are
        injected in place, as PEFT does; no weight of the model changes.
    config : LoraConfig
        Copied. Without ``target_modules``, `default_targets` are used, with a warning if they cover
        less than half of the weights of the model's blocks. ``rank_pattern``,
        ``modules_to_save``, ``use_rslora``, ``use_dora`` and so on work as in PEFT.
    data : iterable of batches, or mapping of str to Projector
        Calibration batches, a ``DataLoader`` for example; or fitted projectors by the layers'
        names in ``model``, as `ipa_torch.fit_projectors` returns them.
    adapter_name, trainable, scaling, expert_sharing, routing_weights, on_missing, **options
        As for `initialize_lora_ipa_weights`.

    Returns
    -------
    PeftModel
        ``save_pretrained``, ``merge_and_unload`` and trainers work as for any LoRA adapter.

    Raises
    ------
    IPAError
        As for `initialize_lora_ipa_weights`; the model is left without adapters then.

    Examples
    --------
    >>> import torch
    >>> from peft import LoraConfig
    >>> from transformers import BertConfig, BertModel
    >>> size = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    >>> bert = BertModel(BertConfig(vocab_size=16, **size))
    >>> batches = [{"input_ids": torch.arange(12).reshape(3, 4)}] * 2
    >>> config = LoraConfig(r=2, target_modules=["query", "value"])
    >>> model = get_ipa_model(bert, config, batches, progress=False)
    >>> [name for name, p in model.named_parameters() if p.requires_grad and "query" in name]
    ['base_model.model.encoder.layer.0.attention.self.query.lora_B.default.weight']
    """
    check_without_adapters(
        model, "add another with add_adapter() and call ipa_hf.initialize_lora_ipa_weights"
    )
    check_adapter_name(adapter_name)
    check_initializable(config)  # before PEFT injects adapters, as KaSA and PiSSA change weights
    config = copy_lora_config(config)
    if config.target_modules is None and config.target_parameters is None:
        config.target_modules = default_targets(model)
        warn_of_small_coverage(model, config.target_modules)
    taken = f"a {type(model).__name__} and a LoraConfig that PEFT takes"
    with restored_on_error(model):
        with peft_errors(taken, "name other layers in target_modules"):
            peft_model = get_peft_model(model, config, adapter_name=adapter_name)
        return initialize_lora_ipa_weights(
            peft_model,
            data,
            adapter_name=adapter_name,
            trainable=trainable,
            scaling=scaling,
            expert_sharing=expert_sharing,
            routing_weights=routing_weights,
            on_missing=on_missing,
            **options,
        )


def initialize_lora_ipa_weights(
    peft_model: Model,
    data: Iterable[Any] | Mapping[str, Projector],
    *,
    adapter_name: str = "default",
    trainable: bool = False,
    scaling: Scaling = "energy",
    expert_sharing: ExpertSharing = "never",
    routing_weights: bool = False,
    on_missing: OnMissing = "warn",
    **options: Unpack[FitOptions],
) -> Model:
    r"""Set ``lora_A`` of a fresh LoRA adapter to a scaled P; ``lora_B`` stays zero.

    Parameters
    ----------
    peft_model : torch.nn.Module
        With an untrained LoRA adapter of this name; other adapters may be trained. A `PeftModel`,
        also with ``mixed=True``, or a model that holds PEFT's adapters (see `freeze_projections`).
        Modified in place.
    data : iterable of batches, or mapping of str to Projector
        Calibration batches, on which the base model is run without adapters; or fitted projectors
        by the layers' names in the base model. A projector of larger rank than its layer is
        truncated.
    adapter_name : str, default "default"
        The adapter.
    trainable : bool, default False
        Train A as well as B. By default A stays frozen, also when PEFT switches adapters.
    scaling : "energy" or float, default "energy"
        ``"energy"``: s gives A x = s P x the mean energy that LoRA's random A gives it, so that
        alpha keeps its meaning in LoRA. A number: s makes the layer compute
        :math:`W x + \lambda B P x` with that lambda, for any alpha.
    expert_sharing : {"never", "unreached", "always"}, default "never"
        Projectors of fused experts (``target_parameters``). ``"never"``: a P for each expert.
        ``"always"``: the same P for all experts of a layer. ``"unreached"``: the layer's P only for
        experts that no token is routed to. See `expert_layers`.
    routing_weights : bool, default False
        Weight the rows of fused experts by the router's weights.
    on_missing : {"warn", "raise", "ignore"}, default "warn"
        Action for layers without a projector: layers that never ran, and layers that are not
        linear. ``"warn"`` names them in a warning; with ``"warn"`` and ``"ignore"`` they keep
        LoRA's random A.
    **options
        Options of `ipa_torch.fit_projectors`, if ``data`` is batches: see
        `ipa_torch.FitOptions`.

    Returns
    -------
    torch.nn.Module
        The same model; its outputs are those of the base model until B is trained.

    Raises
    ------
    SettingError
        If the adapter is trained, merged, not LoRA, or a variant of LoRA that changes base weights
        or the shape of A; the message names the fields of its configuration.
    LayerError
        If a layer has no projector (``on_missing="raise"``), or no linear layer at all has one.
    RankError, ShapeError
        If a projector does not fit its layer; the message names it.
    IPAError
        Any error of `ipa_torch.fit_projectors`; the message names the layer.

    Notes
    -----
    Cost: that of `ipa_torch.fit_projectors`, a forward pass for each batch and the learner's work.

    Examples
    --------
    >>> import torch
    >>> from peft import LoraConfig, get_peft_model
    >>> from transformers import BertConfig, BertModel
    >>> import ipa_hf
    >>> model = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    >>> peft_model = get_peft_model(model, LoraConfig(r=2, target_modules=["query"]))
    >>> loader = [{"input_ids": torch.randint(0, 99, (4, 6))}]
    >>> peft_model = ipa_hf.initialize_lora_ipa_weights(peft_model, loader, progress=False)
    >>> peft_model.print_trainable_parameters()  # doctest: +ELLIPSIS
    trainable params: 16 ...
    """
    config = lora_config(peft_model, adapter_name)
    layers = lora_layers(peft_model, adapter_name)
    trainable = boolean("trainable", trainable)
    routing_weights = boolean("routing_weights", routing_weights)
    check_scaling(scaling)
    check_choice("on_missing", on_missing, OnMissing)
    check_choice("expert_sharing", expert_sharing, ExpertSharing)
    if isinstance(data, Mapping):
        check_projectors(data, cure="pass batches in a list")
        _check_no_options(options, expert_sharing, routing_weights)
    for name, layer in layers.items():
        materialize(name, layer, adapter_name)
    check_fresh(config, layers, adapter_name)
    supported = _supported_layers(peft_model, layers, adapter_name, on_missing)
    if not supported:  # embeddings alone, for example: the adapter stays LoRA's, as was said
        return peft_model
    slots = lora_slots(supported, adapter_name)
    if isinstance(data, Mapping):
        projectors: Mapping[str, Projector] = data
        row_weights = None
    else:
        projectors = fit_lora_projectors(
            peft_model,
            {name: int(layer.r[adapter_name]) for name, layer in supported.items()},
            data,
            options,
            fused=[name for name, layer in supported.items() if isinstance(layer, ParamWrapper)],
            sharing=expert_sharing,
            routing_weights=routing_weights,
        )
        row_weights = row_weights_name(options.get("row_weights", attention_mask))
    matched = _match_projectors(slots, projectors, on_missing)
    truncated = {name: truncate_to_slot(name, slots[name], matched[name]) for name in matched}
    initialized = {
        name: write_lora_A(slots[name], projector, scaling, adapter_name)
        for name, projector in truncated.items()
    }
    metadata = AdapterMetadata(not trainable, scaling, initialized, row_weights)
    keep_metadata(peft_model, adapter_name, metadata)
    for name in {layer_name(name) for name in initialized}:
        set_lora_A_frozen(supported[name], adapter_name, not trainable)
    return peft_model


def _check_no_options(
    options: FitOptions, expert_sharing: ExpertSharing, routing_weights: bool
) -> None:
    """Check that no option of a fit is passed with fitted projectors."""
    if options or expert_sharing != "never" or routing_weights:
        raise SettingError(
            "expected no options of a fit with fitted projectors, got "
            f"{sorted(options)}, expert_sharing={expert_sharing!r} and "
            f"routing_weights={routing_weights!r}; remove them, or pass batches"
        )


def _supported_layers(
    peft_model: torch.nn.Module,
    layers: Mapping[str, LoraLayer],
    adapter_name: str,
    on_missing: OnMissing,
) -> dict[str, LoraLayer]:
    """Return the layers that take a projection; report others before the fit, which takes long."""
    if not layers:
        raise LayerError(
            f"expected an adapter {adapter_name!r} with a linear layer or fused experts, got none; "
            "name some in target_modules or target_parameters"
        )
    unsupported = {
        name: f"{layer_kind(x)} are not supported"
        for name, x in layers.items()
        if not takes_projection(x, adapter_name)
    }
    lost = lost_on_loading(peft_model, adapter_name)
    unsupported |= {
        name: "PEFT renames its saved LoRA on loading and loses it"
        for name, layer in layers.items()
        if (name.rpartition(".")[0] if isinstance(layer, ParamWrapper) else name) in lost
    }
    _report(unsupported, on_missing)
    return {name: layer for name, layer in layers.items() if name not in unsupported}


def _match_projectors(
    slots: Mapping[str, LoraSlot], projectors: Mapping[str, Projector], on_missing: OnMissing
) -> dict[str, Projector]:
    """Return the projector of each slot that has one; report the others."""
    matched, unreached = find_projectors(slots, projectors)
    reasons = getattr(projectors, "missing", {})
    missing = {name: _reason(name, reasons) for name in slots if name not in matched}
    # Without any projector the adapter would be plain LoRA: an error under every setting.
    _report(missing, on_missing if matched else "raise")
    if unreached:
        warn_caller(
            f"{len(unreached)} experts use the projector shared by their layer, as no token was "
            f"routed to them ({', '.join(compact_names(unreached))})",
        )
    return matched


def _reason(name: str, reasons: Mapping[str, str]) -> str:
    """Return the reason that a slot has no projector."""
    reason = reasons.get(name, "no projector of this name")
    return (
        "no token was routed to it" if name != layer_name(name) and reason == NEVER_RAN else reason
    )


def _report(missing: Mapping[str, str], on_missing: OnMissing) -> None:
    """Raise or warn about layers without a projector, with the reason for each."""
    if not missing or on_missing == "ignore":
        return
    by_reason: dict[str, list[str]] = {}
    for name, reason in missing.items():
        by_reason.setdefault(reason, []).append(name)
    listed = "; ".join(
        f"layer {name!r}: {reason}"
        for reason, names in by_reason.items()
        for name in compact_names(names)
    )
    if on_missing == "raise":
        raise LayerError(
            f"expected a projector for every layer with the adapter, got none for {len(missing)} "
            f"({listed}); remove them from target_modules, or pass on_missing='warn' to keep "
            "LoRA's random A there"
        )
    warn_caller(
        f"{len(missing)} layers keep LoRA's random A, as they have no projector ({listed})",
    )
