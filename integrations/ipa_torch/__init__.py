"""Projections learned from the activations of any torch model, placed into its layers."""

from ipa_core.errors import MissingDependencyError

try:
    import torch  # noqa: F401
    import tqdm  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        f"ipa_torch needs {error.name}; install it with: pip install 'ipa-projectors[torch]'"
    ) from error

from ipa_torch.adapted import Adapted
from ipa_torch.adapters import (
    adapters_of,
    attach,
    detach,
    disabled,
    merge,
    set_adapter,
    unmerge,
)
from ipa_torch.checkpointing import Checkpoints
from ipa_torch.damping import DampedGradientSketch
from ipa_torch.errors import LayerError, PeerError
from ipa_torch.fit import fit_projectors
from ipa_torch.gradient import fit_gradient_projectors
from ipa_torch.memory import learner_bytes
from ipa_torch.online import OnlineLearning
from ipa_torch.projection import Projection, energy_scale
from ipa_torch.projectors import Projectors
from ipa_torch.saving import adapter_state_dict, load_adapter_state_dict
from ipa_torch.sketch import GradientSketch
from ipa_torch.storing import store_activations
from ipa_torch.targets import select_layers
from ipa_torch.weighting import attention_mask

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
