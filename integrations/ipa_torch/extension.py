"""Names for packages that extend ipa_torch, such as ipa_hf and ipa_timm.

They are no part of the interface for users, and may change in any release.
"""

from ipa_torch._adapters.adapter_file import read_adapter_file, write_adapter_file
from ipa_torch._adapters.adapter_layer import adapter_layers
from ipa_torch._adapters.adapter_scale import Scaling, check_scaling, energy_scale, resolve_scale
from ipa_torch._adapters.atomic_change import atomic_change
from ipa_torch._adapters.attach import check_attachable
from ipa_torch._adapters.shared_projection import SharedProjection
from ipa_torch._capture.batch_device import device_of, on_device
from ipa_torch._capture.hooks import Hook, HookSet
from ipa_torch._capture.row_selection import RowSelection
from ipa_torch._fit.checkpoint import remove_checkpoints
from ipa_torch._fit.collector import NEVER_RAN
from ipa_torch._fit.missing_layers import OnMissing, report_missing
from ipa_torch._float64 import in_float64
from ipa_torch._layer_rank import resolve_rank
from ipa_torch._layers.conv_view import ConvView
from ipa_torch._layers.execution_device import execution_device
from ipa_torch._layers.layer_lookup import get_layer
from ipa_torch._layers.layer_properties import (
    Convolution,
    features_of,
    is_conv1d,
    is_linear,
    outputs_of,
)
from ipa_torch._layers.linear_view import LinearView
from ipa_torch._layers.matmul_view import view_of
from ipa_torch._layers.output_head import classifier_modules
from ipa_torch._layers.row_subset import RowSubset
from ipa_torch._layers.row_view import WeightedRows
from ipa_torch._layers.targets import Targets, compile_pattern
from ipa_torch._layers.unwrap import check_model, unwrap_model
from ipa_torch._settings import check_choice, check_dropout
from ipa_torch.layer_projectors import check_projectors

__all__ = [
    "NEVER_RAN",
    "ConvView",
    "Convolution",
    "Hook",
    "HookSet",
    "LinearView",
    "OnMissing",
    "RowSelection",
    "RowSubset",
    "Scaling",
    "SharedProjection",
    "Targets",
    "WeightedRows",
    "adapter_layers",
    "atomic_change",
    "check_attachable",
    "check_choice",
    "check_dropout",
    "check_model",
    "check_projectors",
    "check_scaling",
    "classifier_modules",
    "compile_pattern",
    "device_of",
    "energy_scale",
    "execution_device",
    "features_of",
    "get_layer",
    "in_float64",
    "is_conv1d",
    "is_linear",
    "on_device",
    "outputs_of",
    "read_adapter_file",
    "remove_checkpoints",
    "report_missing",
    "resolve_rank",
    "resolve_scale",
    "unwrap_model",
    "view_of",
    "write_adapter_file",
]
