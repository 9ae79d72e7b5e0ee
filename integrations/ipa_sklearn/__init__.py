"""Streaming PCA as a scikit-learn estimator."""

from ipa_core.optional_dependencies import dependency_error as _dependency_error

try:
    import sklearn as _sklearn  # noqa: F401
except Exception as error:  # a clash of versions raises RuntimeError and others
    raise _dependency_error(error, "sklearn", extra="sklearn", user="ipa_sklearn") from error

from ipa_sklearn.streaming_pca import StreamingPCA

__all__ = ["StreamingPCA"]
