"""Projections learned from the activations of any torch model, placed into its layers."""

from ipa_core.errors import MissingDependencyError

try:
    import torch  # noqa: F401
    import tqdm  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        f"ipa_torch needs {error.name}; install it with: pip install 'ipa-projectors[torch]'"
    ) from error

from ipa_torch.errors import LayerError
from ipa_torch.fit import fit_projectors
from ipa_torch.projectors import Projectors
from ipa_torch.targets import select_layers
from ipa_torch.weighting import attention_mask

__all__ = ["LayerError", "Projectors", "attention_mask", "fit_projectors", "select_layers"]
