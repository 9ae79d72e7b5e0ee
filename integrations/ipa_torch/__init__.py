"""Low-rank adapters for any torch model, with projections learned from its activations."""

from ipa_core.optional_dependencies import dependency_error as _dependency_error

try:
    import torch  # noqa: F401
    import tqdm  # noqa: F401
except Exception as error:  # a clash of versions raises RuntimeError and others
    raise _dependency_error(error, "torch", "tqdm", extra="torch", user="ipa_torch") from error

from ipa_torch._adapters.active_adapter import disable_adapter, list_adapters, set_adapter
from ipa_torch._adapters.adapter_file import load_adapter, save_adapter
from ipa_torch._adapters.adapter_layer import AdapterLayer
from ipa_torch._adapters.attach import attach, detach
from ipa_torch._adapters.merge import merge, unmerge
from ipa_torch._adapters.online_learning import OnlineLearning
from ipa_torch._adapters.state_dict import adapter_state_dict, load_adapter_state_dict
from ipa_torch._capture.attention_mask import attention_mask
from ipa_torch._fit.activation_writer import store_activations
from ipa_torch._fit.attention_head_learners import HeadLearners
from ipa_torch._fit.checkpoint import CheckpointConfig
from ipa_torch._fit.early_stopping import StoppingCriteria
from ipa_torch._fit.fit_options import FitOptions
from ipa_torch._fit.learner_bytes import learner_bytes
from ipa_torch._fit.learner_fit import fit_learners
from ipa_torch._fit.projector_fit import fit_projectors
from ipa_torch._gradient.damped_gradient_sketch import DampedGradientSketch
from ipa_torch._gradient.gradient_fit import fit_gradient_projectors
from ipa_torch._gradient.gradient_sketch import GradientSketch
from ipa_torch._gradient.gradient_weighted_inputs import GradientWeightedInputs
from ipa_torch._layers.targets import select_layers
from ipa_torch.errors import LayerError, PeerError
from ipa_torch.layer_projectors import LayerLearners, LayerProjectors

__all__ = [
    "AdapterLayer",
    "CheckpointConfig",
    "DampedGradientSketch",
    "FitOptions",
    "GradientSketch",
    "GradientWeightedInputs",
    "HeadLearners",
    "LayerError",
    "LayerLearners",
    "LayerProjectors",
    "OnlineLearning",
    "PeerError",
    "StoppingCriteria",
    "adapter_state_dict",
    "attach",
    "attention_mask",
    "detach",
    "disable_adapter",
    "fit_gradient_projectors",
    "fit_learners",
    "fit_projectors",
    "learner_bytes",
    "list_adapters",
    "load_adapter",
    "load_adapter_state_dict",
    "merge",
    "save_adapter",
    "select_layers",
    "set_adapter",
    "store_activations",
    "unmerge",
]
