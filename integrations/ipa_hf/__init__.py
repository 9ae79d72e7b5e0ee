"""Learned projections for users of transformers and PEFT: ordinary LoRA adapters, better begun."""

from ipa_core.errors import MissingDependencyError

try:
    import peft as _peft  # noqa: F401
    import transformers as _transformers  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        f"expected peft and transformers, got no {error.name}; "
        "install them with pip install 'ipa-projectors[hf]'"
    ) from error

from ipa_hf.adapters import get_ipa_model, initialize
from ipa_hf.callback import OnlineCallback
from ipa_hf.export import export_lora
from ipa_hf.freezing import freeze_projections
from ipa_hf.ranks import match_ranks
from ipa_hf.storage import load
from ipa_hf.targets import default_targets
from ipa_hf.weights import causal_label_mask

__all__ = [
    "OnlineCallback",
    "causal_label_mask",
    "default_targets",
    "export_lora",
    "freeze_projections",
    "get_ipa_model",
    "initialize",
    "load",
    "match_ranks",
]
