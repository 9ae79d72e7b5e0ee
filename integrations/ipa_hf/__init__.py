"""LoRA adapters of PEFT, initialized from the activations of a transformers model."""

from ipa_core.optional_dependencies import dependency_error as _dependency_error

try:
    import peft as _peft  # noqa: F401
    import transformers as _transformers  # noqa: F401
except Exception as error:  # a clash of versions raises RuntimeError and others
    raise _dependency_error(error, "peft", "transformers", extra="hf", user="ipa_hf") from error

from ipa_hf.block_coverage import target_coverage
from ipa_hf.callback import OnlineCallback
from ipa_hf.export import export_lora
from ipa_hf.first_token_mask import without_first_token
from ipa_hf.freezing import freeze_projections
from ipa_hf.initialize import get_ipa_model, initialize_lora_ipa_weights
from ipa_hf.label_mask import causal_label_mask
from ipa_hf.load import load_adapter
from ipa_hf.rank_pattern import match_ranks
from ipa_hf.shared_adapter_files import load_shared, save_shared
from ipa_hf.shared_adapters import share
from ipa_hf.targets import default_targets
from ipa_hf.temporary_expert_layers import expert_layers

__all__ = [
    "OnlineCallback",
    "causal_label_mask",
    "default_targets",
    "expert_layers",
    "export_lora",
    "freeze_projections",
    "get_ipa_model",
    "initialize_lora_ipa_weights",
    "load_adapter",
    "load_shared",
    "match_ranks",
    "save_shared",
    "share",
    "target_coverage",
    "without_first_token",
]
