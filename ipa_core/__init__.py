"""Streaming low-rank projectors for adapting foundation models, on any array library."""

from importlib.metadata import version as _version

from ipa_core.covariance import ExactCovariance
from ipa_core.errors import (
    ArrayTypeError,
    EmptyStreamError,
    FileFormatError,
    IPAError,
    MissingDependencyError,
    NonFiniteError,
    RankError,
    SettingError,
    ShapeError,
    StreamError,
    WeightError,
)
from ipa_core.fit import fit_projector
from ipa_core.incremental_pca import IncrementalPCA
from ipa_core.learner import Guarantee, Learner
from ipa_core.projector import Projector
from ipa_core.randomized_svd import RandomizedSVD
from ipa_core.storage import load, load_state, save, save_state

__version__ = _version("ipa-projectors")

__all__ = [
    "ArrayTypeError",
    "EmptyStreamError",
    "ExactCovariance",
    "FileFormatError",
    "Guarantee",
    "IPAError",
    "IncrementalPCA",
    "Learner",
    "MissingDependencyError",
    "NonFiniteError",
    "Projector",
    "RandomizedSVD",
    "RankError",
    "SettingError",
    "ShapeError",
    "StreamError",
    "WeightError",
    "fit_projector",
    "load",
    "load_state",
    "save",
    "save_state",
]
