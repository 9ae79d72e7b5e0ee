"""Metrics of projectors: principal angles, excess error, effective rank, rank for an energy."""

from __future__ import annotations

from ipa_core import _array, _torch_modes, settings
from ipa_core._array import Array, Namespace, cast, device, namespace, wide_dtype
from ipa_core.errors import (
    EmptyStreamError,
    IPAError,
    RankError,
    ShapeError,
    with_context,
)
from ipa_core.io.streams import ActivationStream, labeled_batches
from ipa_core.learners.covariance import ExactCovariance
from ipa_core.projector import Projector, check_projector


def principal_angles(first: Projector, second: Projector) -> Array:
    r"""Return the principal angles between the row spaces of two projectors, in radians.

    .. math:: \theta_i = \operatorname{atan2}(s_i, c_i)

    with c the singular values of :math:`P_1 P_2^\top` and s those of the part of the smaller space
    outside the larger space: accurate for small and for large angles.

    Parameters
    ----------
    first, second : Projector
        Of equal features, in the same library and on the same device; ranks may differ.

    Returns
    -------
    array of shape (min(rank, rank),)
        Increasing, between 0 and pi / 2.

    Raises
    ------
    ShapeError
        If the features differ.
    ArrayTypeError
        If an argument is no projector, or libraries or devices differ.

    References
    ----------
    Knyazev and Argentati, "Principal angles between subspaces in an A-based scalar product", 2002.

    Examples
    --------
    >>> import numpy as np
    >>> from ipa_core import fit_projector, principal_angles
    >>> x = np.random.default_rng(0).standard_normal((100, 5)) * [5, 4, 3, 2, 1]
    >>> float(principal_angles(fit_projector(x, 2), fit_projector(10 * x, 3)).max().round(6))
    0.0
    """
    for projector in (first, second):
        check_projector(projector)
    if first.features != second.features:
        raise ShapeError(
            f"expected projectors of equal features, got {first.features} and {second.features}"
        )
    xp = _array.check_home(
        first.components,
        second.components,
        "move a projector with projector.to(library, device=...)",
    )
    with _torch_modes.isolated(first.components):
        return _principal_angles(xp, first.components, second.components)


def _principal_angles(xp: Namespace, first: Array, second: Array) -> Array:
    wide = wide_dtype(xp, device(first))
    small, large = sorted((first, second), key=lambda rows: int(rows.shape[0]))
    small, large = cast(xp, small, wide), cast(xp, large, wide)
    overlap = small @ large.T
    cosines = xp.linalg.svdvals(overlap)
    sines = xp.flip(xp.linalg.svdvals(small - overlap @ large))[: cosines.shape[0]]
    return xp.atan2(sines, cosines)


def excess_error(projector: Projector, held_out: ActivationStream) -> float:
    """Return the relative excess of a projector's reconstruction error over the optimum.

    Parameters
    ----------
    projector : Projector
        Of any learner.
    held_out : activation stream
        Held-out rows, in the projector's library; read once.

    Returns
    -------
    float
        residual / optimal residual - 1, about the projector's mean. Zero is the optimum; it is
        infinite where the optimum loses nothing and the projector does.

    Raises
    ------
    EmptyStreamError
        If the stream has no rows.
    ArrayTypeError, ShapeError, WeightError, NonFiniteError
        If the projector or a batch is not valid; the message has the batch's number or file.

    Notes
    -----
    Cost O(n d^2 + d^3): the exact optimum is computed.

    Examples
    --------
    >>> import numpy as np
    >>> from ipa_core import excess_error, fit_projector
    >>> x = np.random.default_rng(0).standard_normal((2000, 30)) / np.arange(1, 31)
    >>> excess_error(fit_projector(x[:1000], rank=4), x[1000:]) < 0.05
    True
    """
    check_projector(projector)
    oracle = ExactCovariance(projector.rank)
    for label, batch, weights in labeled_batches(held_out):
        try:
            oracle.update(_about_mean(projector, batch), weights)
        except IPAError as error:
            raise with_context(error, label) from error
    if oracle.samples == 0:
        raise EmptyStreamError(
            "expected a held-out stream with rows of positive weight, got none; check that the "
            "stream is not used up and that the mask keeps some rows"
        )
    residual = oracle.residual(projector)
    best = oracle.residual(oracle.finalize())
    if best <= 0.0:
        return 0.0 if residual <= 0.0 else float("inf")
    return residual / best - 1.0


def _about_mean(projector: Projector, batch: Array) -> Array:
    """Return the rows minus the projector's mean, float32 at least."""
    xp = _array.check_array(batch)
    _array.check_home(projector.components, batch, "pass batches like the projector's arrays")
    if batch.ndim < 1 or batch.shape[-1] != projector.features:
        raise ShapeError(
            f"expected batches of {projector.features} features, the projector's, "
            f"got shape {tuple(batch.shape)}"
        )
    with _torch_modes.isolated(batch):
        rows = cast(xp, _array.detached(batch), _array.state_dtype(xp, batch))
        return rows - cast(xp, projector.mean, rows.dtype)


def effective_rank(projector: Projector) -> float:
    r"""Return the participation ratio of the captured energies, between 1 and the rank.

    .. math:: \frac{(\sum_i e_i)^2}{\sum_i e_i^2}

    It is the rank if all directions carry the same energy. All-zero data gives 0.

    Examples
    --------
    >>> import numpy as np
    >>> from ipa_core import effective_rank, fit_projector
    >>> round(effective_rank(fit_projector(np.eye(6), rank=4)), 6)
    4.0
    """
    check_projector(projector)
    xp = namespace(projector.energies)
    largest = xp.max(projector.energies)
    if float(largest) == 0.0:
        return 0.0
    shares = projector.energies / largest
    return float(xp.sum(shares)) ** 2 / float(xp.sum(shares**2))


def rank_for_energy(projector: Projector, share: float) -> int:
    """Return the least rank that captures a share of the energy.

    Parameters
    ----------
    projector : Projector
        Its energies are the known part of the spectrum.
    share : float
        Between 0 (not included) and 1.

    Raises
    ------
    RankError
        If the whole projector captures less, or the share is out of range.

    Examples
    --------
    >>> import numpy as np
    >>> from ipa_core import fit_projector, rank_for_energy
    >>> rank_for_energy(fit_projector(np.diag([4.0, 2.0, 1.0]), rank=3), 0.9)
    2
    """
    check_projector(projector)
    if not 0.0 < settings.number("share", share, error=RankError) <= 1.0:
        raise RankError(f"expected a share between 0 and 1, got {share}")
    for rank in range(1, projector.rank + 1):
        if projector.captured(rank) >= share:
            return rank
    raise RankError(
        f"expected a share of at most {projector.captured():.4f}, which all {projector.rank} "
        f"directions capture, got {share}; learn a projector of a larger rank"
    )
