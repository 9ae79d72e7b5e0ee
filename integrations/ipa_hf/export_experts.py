"""Export of fused experts for inference servers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from peft.tuners.lora.layer import ParamWrapper
from torch import nn
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from ipa_core.errors import SettingError
from ipa_hf.expert_lora import expert_A_and_B
from ipa_hf.export_rank import LoraPair, UniformSize
from ipa_hf.fused_parameters import FusedParameter

_MATRIX = re.compile(r"(?P<experts>.+)\.(?P<expert>\d+)\.(?P<matrix>\w+)\.weight")


@dataclass(frozen=True)
class ExpertExport:
    """Tensors of fused experts by layer names of the file, and the targets of its configuration."""

    pairs: dict[str, LoraPair] = field(default_factory=dict)
    target_modules: set[str] = field(default_factory=set)
    target_parameters: set[str] = field(default_factory=set)


def export_experts(
    model: nn.Module, layers: Mapping[str, ParamWrapper], size: UniformSize, adapter_name: str
) -> ExpertExport:
    """Return the LoRA of fused experts in a form that servers load.

    The form follows the checkpoints of the model. If they store a matrix for each expert, the
    adapter has A and B of ``experts.0.gate_proj`` and so on; gate and up have the same A. If they
    store fused parameters under transformers' names, the adapter is in PEFT's layout. A parameter
    without LoRA is written as zeros if the other parameter of its layer has LoRA.

    Raises
    ------
    SettingError
        If the checkpoints store experts in another form.
    """
    export = ExpertExport()
    holders = {name.rpartition(".")[0]: layer.get_base_layer() for name, layer in layers.items()}
    for holder, experts in holders.items():
        first = "gate_up_proj" if experts.has_gate else "up_proj"
        matrices = {leaf: f"{holder}.{leaf}" for leaf in (first, "down_proj")}
        pairs = {
            name: _pair(FusedParameter(name, experts), layers.get(name), size, adapter_name)
            for name in matrices.values()
        }
        separate = _separate(model, pairs)
        if separate is not None:
            export.pairs.update(separate)
            export.target_modules.update(name.rpartition(".")[2] for name in separate)
        else:
            for name, (a, b) in zip((f"{holder}.base_layer", holder), pairs.values(), strict=True):
                export.pairs[name] = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1).contiguous()
            export.target_parameters.update(".".join(x.split(".")[-2:]) for x in pairs)
    return export


def _pair(
    fused: FusedParameter, layer: ParamWrapper | None, size: UniformSize, adapter_name: str
) -> LoraPair:
    """Return A (experts, rank, features) and B (experts, outputs, rank) of a parameter."""
    count, features, outputs = fused.sizes
    if layer is None:
        return size.zeros(features, outputs, count)
    return size.pad(*expert_A_and_B(layer, adapter_name), layer.scaling[adapter_name])


def _separate(model: nn.Module, pairs: Mapping[str, LoraPair]) -> dict[str, LoraPair] | None:
    """Return A and B of each expert by names of the checkpoint; None if it stores fused parameters.

    B has the outputs of the parameter, so transformers' conversion of parameters divides it too.
    """
    separate: dict[str, LoraPair] = {}
    for name, (a, b) in pairs.items():
        pieces = {name: b}
        if isinstance(model, PreTrainedModel):
            pieces = revert_weight_conversion(model, pieces)
        if [*pieces] == [name]:
            return None
        for piece, part in pieces.items():
            match = _MATRIX.fullmatch(piece)
            if match is None or part.ndim != 2 or part.shape[-1] != b.shape[-1]:
                raise SettingError(
                    f"layer {name!r}: expected checkpoints with a matrix for each expert or with "
                    f"fused parameters under transformers' names, got {piece!r}; servers cannot "
                    "load its adapter; serve the model of merge_and_unload()"
                )
            separate[piece.removesuffix(".weight")] = a[int(match["expert"])].clone(), part
    return separate
