"""Putting learned projections into the LoRA adapters of a PEFT model."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Unpack

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from ipa_core import Projector
from ipa_core.errors import SettingError
from ipa_hf.adapter_metadata import AdapterRecord, attach_metadata
from ipa_hf.fit import FitOptions, learn
from ipa_hf.freezing import set_lora_A_frozen
from ipa_hf.lora_init import check_fresh, truncate_to_layer, write_lora_A
from ipa_hf.lora_layers import (
    adapted_layers,
    layer_kind,
    lora_config,
    materialise,
    takes_projection,
)
from ipa_hf.scaling import Scaling, check_scaling
from ipa_hf.targets import default_targets
from ipa_torch import LayerError

OnMissing = Literal["raise", "warn"]


def get_ipa_model(
    model: torch.nn.Module,
    config: LoraConfig,
    data: Iterable[Any] | Mapping[str, Projector],
    *,
    adapter_name: str = "default",
    trainable: bool = False,
    scaling: Scaling = "energy",
    on_missing: OnMissing = "raise",
    **options: Unpack[FitOptions],
) -> PeftModel:
    r"""Return a PEFT model whose LoRA adapters start from projections of the layers' inputs.

    Each adapted layer computes :math:`z = W x + \tfrac{\alpha}{r} B (s P) x` with P learned from
    its inputs x, B = 0 at first, and a scalar s, all of it in an ordinary LoRA adapter. Call it
    before the optimizer is made.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers model, or any module that `peft.get_peft_model` takes. As there, adapters
        are injected in place; no weight of the model changes.
    config : LoraConfig
        Any form of ``target_modules``, ``rank_pattern``, ``modules_to_save``, ``use_rslora``,
        ``use_dora`` ... Without ``target_modules``, `default_targets` are meant. Not changed.
    data : iterable of batches, or mapping of str to Projector
        What the model is run on, a ``DataLoader`` for example; or projectors by the layers' names
        in ``model``, as `ipa_torch.fit_projectors` returns them.
    adapter_name, trainable, scaling, on_missing, **options
        As for `initialize_lora_ipa_weights`.

    Returns
    -------
    PeftModel
        An ordinary one: ``save_pretrained``, trainers and ``merge_and_unload`` work as ever.

    Raises
    ------
    IPAError
        As `initialize_lora_ipa_weights` does; the model is then as it was before.

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
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    config = copy.deepcopy(config)
    if config.target_modules is None and config.target_parameters is None:
        config.target_modules = default_targets(model)
    peft_model = get_peft_model(model, config, adapter_name=adapter_name)
    try:
        return initialize_lora_ipa_weights(
            peft_model,
            data,
            adapter_name=adapter_name,
            trainable=trainable,
            scaling=scaling,
            on_missing=on_missing,
            **options,
        )
    except BaseException:
        peft_model.unload()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
        raise


def initialize_lora_ipa_weights(
    peft_model: PeftModel,
    data: Iterable[Any] | Mapping[str, Projector],
    *,
    adapter_name: str = "default",
    trainable: bool = False,
    scaling: Scaling = "energy",
    on_missing: OnMissing = "raise",
    **options: Unpack[FitOptions],
) -> PeftModel:
    r"""Set ``lora_A`` to a multiple of P and ``lora_B`` to zero in a fresh LoRA adapter.

    Parameters
    ----------
    peft_model : PeftModel
        With a LoRA adapter that has not been trained; other adapters may have been. Changed in
        place.
    data : iterable of batches, or mapping of str to Projector
        What the model is run on, with all adapters switched off; or projectors by the layers'
        names in the base model. One of larger rank than its layer is truncated.
    adapter_name : str, default "default"
        The adapter.
    trainable : bool, default False
        Train A along with B. Otherwise A is held fixed through whatever PEFT does, half of the
        parameters.
    scaling : "energy" or float, default "energy"
        ``"energy"``: A = s P with the energy that LoRA's random A would have on these inputs, so
        that alpha means what it means for LoRA. A number: the layer computes
        :math:`W x + \lambda B P x` with exactly that lambda.
    on_missing : {"raise", "warn"}, default "raise"
        What to do about adapted layers without a projection: those that never ran, and those that
        are not linear. ``"warn"`` leaves them as LoRA began them.
    **options
        Passed to `ipa_torch.fit_projectors` where ``data`` is batches: ``learner``,
        ``row_weights``, ``forward``, ``max_rows``, ``max_batches``, ``max_seconds``,
        ``tolerance``, ``max_bytes``, ``checkpoint``, ``progress``.

    Returns
    -------
    PeftModel
        The same model; its outputs are those of the base model until B is trained.

    Raises
    ------
    SettingError
        If the adapter is trained, merged, not LoRA, or begins in a way that changes base weights.
    LayerError
        If a layer gets no projection.
    RankError, ShapeError
        If a projector does not fit its layer; the message names it.
    IPAError
        Whatever learning raises, with the layer's name.

    Notes
    -----
    Cost: one forward pass for each batch, and the learner's; see `ipa_torch.fit_projectors`.

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
    layers = adapted_layers(peft_model, adapter_name)
    check_scaling(scaling)
    for name, layer in layers.items():
        materialise(name, layer, adapter_name)
    check_fresh(lora_config(peft_model, adapter_name), layers, adapter_name)
    linear = {name: x for name, x in layers.items() if takes_projection(x, adapter_name)}
    refused = {
        name: f"{layer_kind(x)} take no projection"
        for name, x in layers.items()
        if name not in linear
    }
    _report(refused, on_missing)  # before learning, which takes long
    if not linear:
        raise LayerError(
            f"expected an adapter {adapter_name!r} with a linear layer, got none; nothing is to be "
            "learned, use it as LoRA begins it"
        )
    if isinstance(data, Mapping):
        if options:
            raise SettingError(f"expected no {sorted(options)} beside projectors that are learned")
        projectors: Mapping[str, Projector] = data
    else:
        ranks = {name: int(layer.r[adapter_name]) for name, layer in linear.items()}
        projectors = learn(peft_model, ranks, data, options)
    reasons = getattr(projectors, "missing", {})
    absent = (name for name in linear if name not in projectors)
    _report({name: reasons.get(name, "no projector has its name") for name in absent}, on_missing)
    fitting = {
        name: truncate_to_layer(name, layer, projectors[name], adapter_name)
        for name, layer in linear.items()
        if name in projectors
    }
    placed = {
        name: write_lora_A(linear[name], projector, scaling, adapter_name)
        for name, projector in fitting.items()
    }
    attach_metadata(peft_model, adapter_name, AdapterRecord(not trainable, scaling, placed))
    for name in placed:
        set_lora_A_frozen(linear[name], adapter_name, not trainable)
    return peft_model


def _report(missing: Mapping[str, str], on_missing: OnMissing) -> None:
    if not missing:
        return
    shown = "; ".join(f"layer {name!r}: {reason}" for name, reason in missing.items())
    if on_missing == "raise":
        raise LayerError(
            f"expected a projection for every adapted layer, got none for {len(missing)} "
            f"({shown}); take them out of target_modules, or pass on_missing='warn' to leave them "
            "as LoRA begins them"
        )
    warnings.warn(f"{len(missing)} layers begin as in LoRA ({shown})", stacklevel=3)
