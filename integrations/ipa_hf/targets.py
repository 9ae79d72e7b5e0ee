"""Default target layers of transformers models: the linear layers of repeated blocks."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator

import torch
from peft import LoraConfig
from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
from torch import nn

from ipa_core.errors import SettingError
from ipa_hf.lost_lora import renamed_on_loading
from ipa_torch.extension import features_of, is_conv1d, is_linear, outputs_of

#: Layers that PEFT refuses in models of these types, as Mamba's kernels read their weights.
_MAMBA = ("falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h")
_READ_BY_KERNELS = ("out_proj", "conv1d")


def default_targets(model: torch.nn.Module) -> str:
    """Return a regular expression for ``LoraConfig(target_modules=...)``: linear layers of blocks.

    Blocks are the repeated parts of a model (the entries of a ``ModuleList``, and of a
    ``Sequential`` of equal parts). All their linear layers are targets: query, key, value and
    output, up, gate and down, fused or not, under any name. Embeddings, poolers and heads lie
    outside of blocks. Within blocks, routers, gates of one output, and layers that PEFT cannot
    adapt are left out. Fused experts are no linear layers: see `target_coverage`.

    Parameters
    ----------
    model : torch.nn.Module
        A transformers model. If it has a ``language_model`` beside other towers, only layers of
        the language model match; in models of two equal towers (CLIP, SigLIP), layers of both.

    Returns
    -------
    str
        PEFT matches it against whole layer names.

    Raises
    ------
    SettingError
        If the model has no linear layers in repeated blocks.

    Examples
    --------
    >>> from transformers import BertConfig, BertModel
    >>> size = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    >>> bert = BertModel(BertConfig(vocab_size=16, **size))
    >>> pattern = default_targets(bert)
    >>> [name for name, _ in bert.named_modules() if re.fullmatch(pattern, name)][-2:]
    ['encoder.layer.0.intermediate.dense', 'encoder.layer.0.output.dense']
    """
    names = _trainable_by_peft(model, list(_block_layers(model)))
    if not names:
        raise SettingError(
            f"expected a model with linear layers in repeated blocks, got {type(model).__name__} "
            "with none; set target_modules in the LoraConfig, for example to 'all-linear'"
        )
    return _pattern(names, (name for name, _ in model.named_modules()))


def block_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules within repeated blocks, with their names.

    In a model with a ``language_model`` beside other towers only those of the language model.
    """
    named = list(model.named_modules())
    blocks = [block for name, module in named for block in _blocks(name, module)]
    inside = tuple(f"{block}." for block in blocks)
    parts = [(name, x) for name, x in named if name in blocks or name.startswith(inside)]
    language = [(name, x) for name, x in parts if "language_model" in name.split(".")]
    yield from language or parts


def _blocks(name: str, container: nn.Module) -> list[str]:
    """Return the names of the entries of a container that are blocks, and no layers themselves."""
    if not isinstance(container, (nn.ModuleList, nn.Sequential)):
        return []
    entries = {key: x for key, x in container.named_children() if [*x.children()]}
    kinds = [type(entry) for entry in entries.values()]
    if isinstance(container, nn.Sequential) and len(kinds) == len(set(kinds)):
        return []
    return [f"{name}.{key}".lstrip(".") for key, x in entries.items() if not is_linear(x)]


def _block_layers(model: nn.Module) -> Iterator[str]:
    """Yield the names of the linear layers of blocks that are worth an adapter and take one."""
    named = dict(model.named_modules())
    tables = {id(x.weight) for x in named.values() if isinstance(x, nn.Embedding)}
    layers: tuple[str, ...] = ()
    for name, module in block_modules(model):
        parent = named[name.rpartition(".")[0]]
        if name.startswith(layers) or not _is_known_to_peft(module, model):
            continue
        layers += (f"{name}.",)
        outputs = outputs_of(module)
        if min(features_of(module), outputs) == 1 or outputs == _experts_beside(parent):
            continue
        read_directly = isinstance(parent, nn.MultiheadAttention)
        if not read_directly and id(getattr(module, "weight", None)) not in tables:
            yield name


def _is_known_to_peft(module: nn.Module, model: nn.Module) -> bool:
    """Return whether PEFT knows a linear layer; quantized ones are of many classes."""
    if getattr(model, "is_quantized", False):
        return is_linear(module)
    plain = type(module).forward is nn.Linear.forward or is_conv1d(module)
    return plain or (isinstance(module, nn.Linear) and _keeps_rows(module))


@torch.no_grad()
def _keeps_rows(module: nn.Linear) -> bool:
    """Return whether a layer with a forward of its own takes rows: grouped ones do not."""
    weight = module.weight
    try:
        outputs = module(
            torch.zeros(2, module.in_features, device=weight.device, dtype=weight.dtype)
        )
    except RuntimeError:  # shapes that do not fit
        return False
    return isinstance(outputs, torch.Tensor) and outputs.shape == (2, module.out_features)


def _experts_beside(parent: nn.Module) -> int | None:
    """Return the number of experts in a module, and so of its router's outputs."""
    experts = getattr(parent, "experts", None)
    if isinstance(experts, (nn.ModuleList, nn.ModuleDict)):
        return len(experts)
    count = getattr(experts, "num_experts", None)
    return count if isinstance(count, int) else None


def _trainable_by_peft(model: nn.Module, names: list[str]) -> list[str]:
    """Leave out layers under names that PEFT refuses, takes for experts, or loses on loading."""
    leaves = {name.rpartition(".")[2] for name in names}
    if getattr(getattr(model, "config", None), "model_type", None) in _MAMBA:
        leaves -= {*_READ_BY_KERNELS}
    kept = {leaf for leaf in leaves if _keeps(model, leaf)}
    names = [name for name in names if name.rpartition(".")[2] in kept]
    lost = renamed_on_loading(model, LoraConfig(target_modules=names), _saved(names))
    return [name for name in names if name not in lost]


def _saved(names: list[str]) -> dict[str, torch.Tensor]:
    """Return what a saved adapter of these layers would have, with tensors of one number."""
    keys = (f"base_model.model.{name}.lora_{part}.weight" for name in names for part in "AB")
    return {key: torch.zeros(1, 1) for key in keys}


def _keeps(model: nn.Module, leaf: str) -> bool:
    """Return whether a target stays one: in some models PEFT takes ``up_proj`` for experts'."""
    config = LoraConfig(target_modules=[leaf])
    try:
        convert_peft_config_for_transformers(config, model, None)
    except ValueError:
        return False
    return list(config.target_modules or ()) == [leaf]


def _pattern(names: Iterable[str], modules: Iterable[str]) -> str:
    """Return a regular expression that matches these names alone among those of the modules."""
    chosen, groups = set(names), defaultdict(list)
    for name in modules:
        groups[_any_block(name)].append(name)
    parts: list[str] = []
    for group, members in groups.items():
        matched = [name for name in members if name in chosen]
        parts += [group] if matched == members else map(re.escape, matched)
    return "|".join(parts)


def _any_block(name: str) -> str:
    r"""Return a pattern for a name with any numbers of blocks.

    Examples
    --------
    >>> print(_any_block("layers.3.mlp.fc1"))
    layers\.\d+\.mlp\.fc1
    """
    return r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split("."))
