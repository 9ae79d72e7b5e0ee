"""Streaming low-rank projectors for adapting foundation models, on any array library."""

from importlib.metadata import PackageNotFoundError as _PackageNotFoundError
from importlib.metadata import version as _version

from ipa_core.cholesky import DampedCholesky, damped_cholesky
from ipa_core.errors import (
    ArrayTypeError,
    BrokenDependencyError,
    EmptyStreamError,
    FileFormatError,
    IPAError,
    MissingDependencyError,
    MissingFileError,
    NonFiniteError,
    PathError,
    RankError,
    SettingError,
    ShapeError,
    StreamError,
    WeightError,
)
from ipa_core.fit import fit_projector
from ipa_core.io.activation_store import ActivationStore
from ipa_core.io.serialization import load, load_state, save, save_state
from ipa_core.learners.autoencoder import ReconstructionAutoencoder
from ipa_core.learners.base import Learner
from ipa_core.learners.covariance import ExactCovariance
from ipa_core.learners.guarantee import Guarantee
from ipa_core.learners.hebbian import HebbianRule
from ipa_core.learners.incremental_pca import IncrementalPCA
from ipa_core.learners.randomized_svd import RandomizedSVD
from ipa_core.metrics import effective_rank, excess_error, principal_angles, rank_for_energy
from ipa_core.projector import Projector
from ipa_core.rank_allocation import allocate_ranks
from ipa_core.whitening_transform import Whitening

try:
    __version__ = _version("ipa-projectors")
except _PackageNotFoundError:  # a plain copy of the tree on the path
    __version__ = "0+unknown"

__all__ = [
    "ActivationStore",
    "ArrayTypeError",
    "BrokenDependencyError",
    "DampedCholesky",
    "EmptyStreamError",
    "ExactCovariance",
    "FileFormatError",
    "Guarantee",
    "HebbianRule",
    "IPAError",
    "IncrementalPCA",
    "Learner",
    "MissingDependencyError",
    "MissingFileError",
    "NonFiniteError",
    "PathError",
    "Projector",
    "RandomizedSVD",
    "RankError",
    "ReconstructionAutoencoder",
    "SettingError",
    "ShapeError",
    "StreamError",
    "WeightError",
    "Whitening",
    "allocate_ranks",
    "damped_cholesky",
    "effective_rank",
    "excess_error",
    "fit_projector",
    "load",
    "load_state",
    "principal_angles",
    "rank_for_energy",
    "save",
    "save_state",
]
