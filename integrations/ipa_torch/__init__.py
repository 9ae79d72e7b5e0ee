"""Projections learned from the activations of any torch model, placed into its layers."""

from ipa_core.errors import MissingDependencyError

try:
    import torch  # noqa: F401
    import tqdm  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        f"ipa_torch needs {error.name}; install it with: pip install 'ipa-projectors[torch]'"
    ) from error

from ipa_torch._adapters.layer import Adapted
from ipa_torch._adapters.model import (
    adapters_of,
    attach,
    detach,
    disabled,
    merge,
    set_adapter,
    unmerge,
)
from ipa_torch._adapters.online import OnlineLearning
from ipa_torch._adapters.projection import Projection, energy_scale
from ipa_torch._adapters.state_dict import adapter_state_dict, load_adapter_state_dict
from ipa_torch._capture.row_weights import attention_mask
from ipa_torch._fit.activation_store import store_activations
from ipa_torch._fit.checkpoint import Checkpoints
from ipa_torch._fit.fit import fit_projectors
from ipa_torch._fit.memory import learner_bytes
from ipa_torch._gradient.damped_sketch import DampedGradientSketch
from ipa_torch._gradient.fit import fit_gradient_projectors
from ipa_torch._gradient.sketch import GradientSketch
from ipa_torch._layers.targets import select_layers
from ipa_torch.errors import LayerError, PeerError
from ipa_torch.projectors import Projectors

__all__ = [
    "Adapted",
    "Checkpoints",
    "DampedGradientSketch",
    "GradientSketch",
    "LayerError",
    "OnlineLearning",
    "PeerError",
    "Projection",
    "Projectors",
    "adapter_state_dict",
    "adapters_of",
    "attach",
    "attention_mask",
    "detach",
    "disabled",
    "energy_scale",
    "fit_gradient_projectors",
    "fit_projectors",
    "learner_bytes",
    "load_adapter_state_dict",
    "merge",
    "select_layers",
    "set_adapter",
    "store_activations",
    "unmerge",
]
