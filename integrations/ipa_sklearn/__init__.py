"""Streaming PCA as a scikit-learn estimator."""

from ipa_core.errors import MissingDependencyError

try:
    import sklearn as _sklearn  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingDependencyError(
        f"expected scikit-learn to be installed, got no {error.name}; "
        "run pip install 'ipa-projectors[sklearn]'"
    ) from error

from ipa_sklearn.streaming_pca import StreamingPCA

__all__ = ["StreamingPCA"]
