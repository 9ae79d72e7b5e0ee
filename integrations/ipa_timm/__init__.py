"""Adapters for timm's vision transformers and convnets, initialized from activations."""

from ipa_core.optional_dependencies import dependency_error as _dependency_error

try:
    import timm  # noqa: F401
    import torch  # noqa: F401
    import tqdm  # noqa: F401
except Exception as error:  # a clash of versions raises RuntimeError and others
    raise _dependency_error(
        error, "timm", "torch", "tqdm", extra="timm", user="ipa_timm"
    ) from error

from ipa_timm.adapter_file import load_adapter, save_adapter
from ipa_timm.adapters import adapt, attach, detach, merge_and_unload
from ipa_timm.fit import fit_projectors
from ipa_timm.preprocessing import preprocess
from ipa_timm.targets import default_targets

__all__ = [
    "adapt",
    "attach",
    "default_targets",
    "detach",
    "fit_projectors",
    "load_adapter",
    "merge_and_unload",
    "preprocess",
    "save_adapter",
]
