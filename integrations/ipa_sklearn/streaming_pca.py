"""The estimator: scikit-learn's `IncrementalPCA` with the learners of `ipa_core` behind it."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Self

from scipy import sparse
from sklearn.decomposition import IncrementalPCA
from sklearn.utils import gen_batches
from sklearn.utils._array_api import get_namespace
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, validate_data

from ipa_core import Learner, RandomizedSVD, SettingError, rank_for_energy, settings
from ipa_core.learners.factory import make_learner
from ipa_sklearn._canonical_components import canonical
from ipa_sklearn._log_likelihood import log_likelihood
from ipa_sklearn._n_components import is_share, resolve_rank

# Entries of the batches that `fit` cuts: some 32 MB where a batch has to be a copy.
_BATCH_ENTRIES = 1 << 22
_FITTED = frozenset(
    {
        "components_",
        "explained_variance_",
        "explained_variance_ratio_",
        "mean_",
        "n_components_",
        "noise_variance_",
        "singular_values_",
    }
)


class StreamingPCA(IncrementalPCA):
    r"""Principal component analysis of a stream of batches, at the cost of a randomized SVD.

    A replacement for `sklearn.decomposition.IncrementalPCA`, of which it is a subclass: the same
    methods, parameters and attributes. The decomposition is that of a learner of `ipa_core`, by
    default two matrix products for a batch instead of an SVD.

    Parameters
    ----------
    n_components : int, float or None, default None
        Number of components; or a share of the variance between 0 and 1, for the fewest
        components that explain it; or None for ``min(n_samples, n_features)``. A share and None
        keep the whole covariance: n_features squared float64 numbers.
    whiten : bool, default False
        Scale the outputs of `transform` to unit variance.
    copy : bool, default True
        Accepted as in `IncrementalPCA`. X is never overwritten.
    batch_size : int, optional
        Rows that `fit` gives the learner at a time; by default as many as have 4 million entries.
        The result does not depend on it beyond the learner's guarantee.
    learner : callable, default `RandomizedSVD`
        Makes the learner from the rank: a `Learner` class, or ``functools.partial`` of one. It
        is called with ``center=True``.

    Attributes
    ----------
    components_ : array of shape (n_components_, n_features)
        Principal axes, by decreasing variance; the largest entry of each is positive.
    mean_ : array of shape (n_features,)
        Mean of the rows.
    explained_variance_ : array of shape (n_components_,)
        Variance along each axis, divided by n - 1, in squared units of X.
    explained_variance_ratio_ : array of shape (n_components_,)
        The same as shares of the whole variance; zeros where the variance is zero.
    singular_values_ : array of shape (n_components_,)
        Singular values of the centered rows.
    noise_variance_ : float
        Mean variance along the directions left out, of ``min(n_samples, n_features)`` in all.
    n_components_ : int
        Number of components.
    n_samples_seen_ : int
        Rows learned from (rows of weight zero do not count).
    batch_size_ : int
        Rows that `fit` gave the learner at a time.
    n_features_in_, feature_names_in_
        As in every estimator.

    Notes
    -----
    ``var_`` is the one attribute of `IncrementalPCA` that is left out: it would cost another pass.
    After `partial_fit` the attributes are computed when they are first asked for, so that a batch
    costs no decomposition. Arrays of other libraries stay in them, on their device, within
    ``sklearn.config_context(array_api_dispatch=True)``.

    Examples
    --------
    >>> from sklearn.datasets import load_digits
    >>> from ipa_sklearn import StreamingPCA
    >>> X, _ = load_digits(return_X_y=True)
    >>> pca = StreamingPCA(n_components=7).fit(X)
    >>> pca.transform(X).shape
    (1797, 7)
    >>> StreamingPCA(n_components=0.9).fit(X).n_components_
    21
    """

    def __init__(
        self,
        n_components: int | float | None = None,
        *,
        whiten: bool = False,
        copy: bool = True,
        batch_size: int | None = None,
        learner: Callable[..., Learner] = RandomizedSVD,
    ) -> None:
        super().__init__(n_components, whiten=whiten, copy=copy, batch_size=batch_size)
        self.learner = learner

    def fit(self, X: Any, y: None = None, sample_weight: Any = None) -> Self:
        """Learn from all rows of X, after forgetting what was learned before.

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
            At least two rows. Of a sparse matrix one batch at a time is made dense.
        y : None
            Ignored.
        sample_weight : array-like of shape (n_samples,), optional
            Weight of each row: a row of weight 2 counts twice.

        Raises
        ------
        ValueError
            If n_components exceeds rows or features, or the weights do not add up to more
            than 1. `ipa_core.IPAError` and scikit-learn's own errors are among them.

        Examples
        --------
        >>> import numpy as np
        >>> from ipa_sklearn import StreamingPCA
        >>> StreamingPCA(n_components=1).fit(np.diag([3.0, 1.0])).explained_variance_
        array([5.])
        """
        X, weights = self._validated(X, sample_weight, accept_sparse="csr", ensure_min_samples=2)
        n_samples, n_features = X.shape
        total = _total_weight(weights, n_samples)
        if not total > 1.0:
            raise SettingError(
                f"expected sample weights that add up to more than 1, got {total:g}; a weight "
                "says how many times a row counts"
            )
        learner = self._make_learner(n_samples, n_features, total)
        self.batch_size_ = self._checked_batch_size(n_features)
        for _ in range(learner.passes):
            for part in gen_batches(n_samples, self.batch_size_):
                learner.update(X[part, :], None if weights is None else weights[part])
        self._keep(learner, total)
        self.n_samples_seen_ = learner.samples // learner.passes
        self._compute_attributes()
        return self

    def partial_fit(
        self, X: Any, y: None = None, check_input: bool = True, sample_weight: Any = None
    ) -> Self:
        """Learn from one more batch of rows.

        Parameters
        ----------
        X : array-like of shape (n_samples, n_features)
            The first batch has at least ``n_components`` rows.
        y : None
            Ignored.
        check_input : bool, default True
            Convert and check X first.
        sample_weight : array-like of shape (n_samples,), optional
            Weight of each row: a row of weight 2 counts twice.

        Raises
        ------
        TypeError
            If X is sparse.
        ValueError
            If n_components exceeds features or rows of the first batch, or was changed since.

        Examples
        --------
        >>> import numpy as np
        >>> from ipa_sklearn import StreamingPCA
        >>> pca = StreamingPCA(n_components=2)
        >>> for batch in np.random.default_rng(0).standard_normal((5, 100, 8)):
        ...     pca = pca.partial_fit(batch)
        >>> pca.n_samples_seen_
        500
        """
        if sparse.issparse(X):
            name = type(self).__name__
            raise TypeError(
                f"{name}.partial_fit does not support sparse input. Either convert data to dense "
                f"or use {name}.fit to do so in batches."
            )
        learner: Learner | None = vars(self).get("_learner")
        if check_input:
            X, sample_weight = self._validated(X, sample_weight, reset=learner is None)
        total = _total_weight(sample_weight, X.shape[0])
        if learner is None:
            learner = self._make_learner(X.shape[0], X.shape[1], total)
            if learner.passes > 1:
                raise SettingError(
                    f"expected a learner of one pass for partial_fit, got {learner!r}, which asks "
                    f"for {learner.passes}; call fit"
                )
        elif self.n_components != self._n_components_begun:
            raise SettingError(
                f"expected n_components={self._n_components_begun!r} as in the first call of "
                f"partial_fit, got {self.n_components!r}; set it back, or begin again with fit"
            )
        else:
            total += self._total_weight
        learner.update(X, sample_weight)
        self._keep(learner, total)
        self.n_samples_seen_ = learner.samples
        return self

    def transform(self, X: Any) -> Any:
        """Return the components of rows, shape (n_samples, n_components).

        Parameters
        ----------
        X : array-like or sparse matrix of shape (n_samples, n_features)
            A sparse matrix is multiplied as it is, never made dense.

        Examples
        --------
        >>> import numpy as np
        >>> from ipa_sklearn import StreamingPCA
        >>> StreamingPCA(n_components=1).fit_transform(np.diag([3.0, 1.0])).round(3)
        array([[ 1.581],
               [-1.581]])
        """
        check_is_fitted(self)
        # Past IncrementalPCA, which makes batches of a sparse matrix dense.
        return super(IncrementalPCA, self).transform(X)

    def score_samples(self, X: Any) -> Any:
        r"""Return the log-likelihood of rows, shape (n_samples,), as `PCA.score_samples` does.

        The model is probabilistic PCA, a Gaussian about ``mean_`` with variance
        ``explained_variance_`` along the components and ``noise_variance_`` along all other
        directions; what is below eps squared counts as that, eps being that of the dtype. The
        precision matrix is never formed: O(n d r).

        Examples
        --------
        >>> import numpy as np
        >>> from ipa_sklearn import StreamingPCA
        >>> X = np.random.default_rng(0).standard_normal((100, 4))
        >>> round(float(StreamingPCA(n_components=2).fit(X).score_samples(X).mean()), 3)
        -5.598
        """
        check_is_fitted(self)
        xp, _ = get_namespace(X)
        X = validate_data(self, X, dtype=[xp.float64, xp.float32], reset=False)
        return log_likelihood(
            xp,
            X - self.mean_,
            self.components_,
            self.explained_variance_,
            float(self.noise_variance_),
        )

    def score(self, X: Any, y: None = None) -> float:
        """Return the mean log-likelihood of rows; see `score_samples`.

        Examples
        --------
        >>> import numpy as np
        >>> from ipa_sklearn import StreamingPCA
        >>> X = np.random.default_rng(0).standard_normal((100, 4))
        >>> round(StreamingPCA(n_components=2).fit(X).score(X), 3)
        -5.598
        """
        scores = self.score_samples(X)
        xp, _ = get_namespace(scores)
        return float(xp.mean(scores))

    def __getattr__(self, name: str) -> Any:
        """Compute the attributes that `partial_fit` left for later."""
        if name not in _FITTED or "_learner" not in vars(self):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        self._compute_attributes()
        return vars(self)[name]

    def __sklearn_is_fitted__(self) -> bool:
        return "_learner" in vars(self)

    def __sklearn_tags__(self) -> Any:
        tags = super().__sklearn_tags__()
        tags.array_api_support = True
        tags.transformer_tags.preserves_dtype = ["float64", "float32"]
        return tags

    def _validated(self, X: Any, sample_weight: Any, **checks: Any) -> tuple[Any, Any]:
        """Return rows and weights as floating arrays of one library.

        The learner looks for values that are not finite.
        """
        xp, _ = get_namespace(X)
        checks |= {"dtype": [xp.float64, xp.float32], "ensure_all_finite": False}
        X = validate_data(self, X, **checks)
        if sample_weight is not None:
            sample_weight = _check_sample_weight(
                sample_weight, X, dtype=X.dtype, ensure_non_negative=True
            )
        return X, sample_weight

    def _make_learner(self, rows: int, features: int, weight: float) -> Learner:
        """Return a fresh learner of the rank that ``n_components`` asks for."""
        settings.boolean("whiten", self.whiten)
        settings.boolean("copy", self.copy)
        settings.check_callable("learner", self.learner, cure="pass a Learner class")
        rank = resolve_rank(self.n_components, rows, features, weight)
        return make_learner(partial(self.learner, center=True), rank)

    def _checked_batch_size(self, features: int) -> int:
        if self.batch_size is None:
            return max(1, _BATCH_ENTRIES // features)
        return settings.integer("batch_size", self.batch_size, least=1, cure="or pass None")

    def _keep(self, learner: Learner, total: float) -> None:
        """Remember a learner that has seen rows; attributes of its former state go."""
        for name in _FITTED & vars(self).keys():
            delattr(self, name)
        self._learner = learner
        self._total_weight = total
        self._n_components_begun = self.n_components

    def _compute_attributes(self) -> None:
        projector = self._learner.finalize()
        if is_share(self.n_components):
            projector = projector.truncate(rank_for_energy(projector, self.n_components))
        xp, total = get_namespace(projector.components)[0], self._total_weight
        rank, energies, energy = projector.rank, projector.energies, projector.total_energy
        unbiased = total / (total - 1.0) if total > 1.0 else math.nan
        left_out = min(int(total), projector.features) - rank
        missed = max(0.0, energy - float(xp.sum(energies)))
        self.n_components_ = rank
        self.components_ = canonical(xp, projector.components, energies)
        self.mean_ = projector.mean
        self.singular_values_ = xp.sqrt(energies * total)
        self.explained_variance_ = energies * unbiased
        self.explained_variance_ratio_ = energies / energy if energy else energies
        self.noise_variance_ = missed * unbiased / left_out if left_out > 0 else 0.0


def _total_weight(weights: Any, rows: int) -> float:
    if weights is None:
        return float(rows)
    xp, _ = get_namespace(weights)
    return float(xp.sum(weights))
