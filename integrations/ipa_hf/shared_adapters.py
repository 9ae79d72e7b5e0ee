"""Adapters of several tasks over one frozen P."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping

import torch
from peft import LoraConfig, PeftModel

from ipa_core import Projector
from ipa_core.errors import SettingError
from ipa_hf.adapter_holder import check_without_adapters
from ipa_hf.adapter_injection import restored_on_error
from ipa_hf.adapter_names import check_adapter_names
from ipa_hf.initialize import get_ipa_model
from ipa_hf.lora_config import check_lora_config, copy_lora_config, lora_config
from ipa_hf.rank_pattern import match_ranks
from ipa_hf.tied_lora_a import check_tieable, tie_adapter
from ipa_torch.extension import Scaling, check_projectors, get_layer, is_conv1d


def share(
    model: torch.nn.Module,
    projectors: Mapping[str, Projector] | str,
    names: Iterable[str],
    *,
    config: LoraConfig | None = None,
    scaling: Scaling = "energy",
) -> PeftModel:
    r"""Return a PEFT model with an adapter for each task, all over the same frozen A = s P.

    Each layer computes :math:`W x + \tfrac{\alpha}{r} B_t (s P) x` for task t, with :math:`B_t = 0`
    at first. A is in memory once. In a batch with rows of several tasks, PEFT's ``adapter_names=``,
    A x is computed once for all rows.

    Parameters
    ----------
    model : torch.nn.Module
        A model without adapters; with the name of an adapter as ``projectors``, the `PeftModel`
        that has it.
    projectors : mapping of str to Projector, or str
        By the layers' names in the model, as from `ipa_torch.fit_projectors`. Or the name of an
        adapter, whose A is shared, and frozen.
    names : iterable of str
        Names of the adapters. Adapters that the model has already, loaded from ordinary folders
        say, must have the same A.
    config : LoraConfig, optional
        By default the layers and ranks are those of the projectors, and alpha is the rank. A
        ``task_type`` gives the model's methods, such as ``generate``, the argument
        ``adapter_names``.
    scaling : "energy" or float, default "energy"
        As for `get_ipa_model`.

    Returns
    -------
    PeftModel
        The first of the new adapters is active, as with `peft.get_peft_model`.

    Raises
    ------
    SettingError
        If there are no names, a name is there twice, the model has other adapters than it should,
        the configuration is not plain LoRA, or adapters differ in A or in their layers.
    LayerError
        If a layer is not linear, or has no projector.
    RankError, ShapeError
        If a projector does not fit its layer; the message names it.

    Notes
    -----
    Memory for N tasks: r (features + N outputs) for each layer, where separate adapters have
    N r (features + outputs). ``save_pretrained`` writes N ordinary adapters, `save_shared` A once.

    Examples
    --------
    >>> import torch
    >>> from transformers import BertConfig, BertModel
    >>> import ipa_hf, ipa_torch
    >>> bert = BertModel(BertConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    >>> batch = {"input_ids": torch.randint(0, 99, (2, 6))}
    >>> projectors = ipa_torch.fit_projectors(bert, [batch], 2, targets=["query"], progress=False)
    >>> model = ipa_hf.share(bert, projectors, ["mail", "news"])
    >>> output = model.eval()(**batch, adapter_names=["news", "__base__"])
    >>> [name.split(".")[-3:] for name, _ in model.named_parameters() if "lora" in name]
    [['lora_A', 'mail', 'weight'], ['lora_B', 'mail', 'weight'], ['lora_B', 'news', 'weight']]
    """
    tasks = check_adapter_names(names)
    if isinstance(projectors, str):
        peft_model = _with_adapter(model, projectors)
        with restored_on_error(peft_model):
            return _tied(peft_model, projectors, tasks)
    check_projectors(projectors)
    check_without_adapters(model, "pass the name of one of them in place of projectors")
    with restored_on_error(model):
        return _tied(_initialized(model, projectors, tasks[0], config, scaling), tasks[0], tasks)


def _tied(peft_model: PeftModel, source: str, tasks: list[str]) -> PeftModel:
    shared = copy.deepcopy(lora_config(peft_model, source))
    shared.inference_mode = False
    for name in {source, *tasks} & {*peft_model.peft_config}:
        check_tieable(peft_model, source, name)  # all of them, before the first is tied
    for name in dict.fromkeys([source, *tasks]):
        tie_adapter(peft_model, source, name, shared)
    return peft_model


def _with_adapter(model: torch.nn.Module, source: str) -> PeftModel:
    if not isinstance(model, PeftModel):
        raise SettingError(
            f"expected a PeftModel with the adapter {source!r}, got a {type(model).__name__}; pass "
            "projectors to make the first adapters"
        )
    lora_config(model, source)
    return model


def _initialized(
    model: torch.nn.Module,
    projectors: Mapping[str, Projector],
    source: str,
    config: LoraConfig | None,
    scaling: Scaling,
) -> PeftModel:
    if config is None:
        config = _default_config(model, projectors)
    check_lora_config(config)
    if config.target_modules is None:
        config = copy_lora_config(config)
        config.target_modules = list(projectors)
    return get_ipa_model(
        model, config, projectors, adapter_name=source, scaling=scaling, on_missing="raise"
    )


def _default_config(model: torch.nn.Module, projectors: Mapping[str, Projector]) -> LoraConfig:
    rank = max((projector.rank for projector in projectors.values()), default=1)
    transposed = any(is_conv1d(get_layer(model, name)) for name in projectors)
    config = LoraConfig(r=rank, lora_alpha=rank, fan_in_fan_out=transposed)
    return match_ranks(config, projectors)
