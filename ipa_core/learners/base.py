"""Base class of the learners, and the laws that they obey."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self, final

from ipa_core import _array, _sparse_rows, _torch_modes
from ipa_core._array import Array
from ipa_core._linalg import fixed_basis
from ipa_core._torch_modes import isolated_method
from ipa_core.errors import EmptyStreamError
from ipa_core.learners._block_learner import BlockLearner
from ipa_core.learners._pending_update import PendingUpdate
from ipa_core.learners._row_blocks import Rows, align, join
from ipa_core.learners._state import check_settings, check_state, check_state_of, flatten, unflatten
from ipa_core.learners._validation import check_mergeable, match, template_of, validate
from ipa_core.learners.guarantee import Guarantee
from ipa_core.projector import Projector


class Learner(BlockLearner):
    r"""Streaming learner of a projector, in one pass and bounded memory.

    The objective is the mean of :math:`\|x - P^\top P x\|^2` over all rows, with orthonormal rows
    of P (``center=False``), or the same about the mean (``center=True``).

    Every learner obeys these laws, exactly or within its `guarantee`:

    * *partition*: any cutting of the stream into batches gives the same result;
    * *merge*: learners of two parts, merged, equal the learner of the whole; merging is
      associative and a fresh learner is neutral;
    * *purity*: no input and no operand is changed. States are never written in place, so
      ``copy.copy(learner)`` is a snapshot;
    * *weights*: a row of weight 0 is absent, a row of weight 2 counts twice;
    * *equivariance*: rotating or scaling the data rotates or scales the result;
    * *library independence*: the same seed gives the same subspace on every array library;
    * *atomicity*: a call that raises leaves the learner as it was.

    Parameters
    ----------
    rank : int
        Rows of P, at least 1 and at most the number of features.
    center : bool, default False
        Learn about the mean (classical PCA) instead of about the origin.
    seed : int, default 0
        Seed of the learner's random choices; drawn on the host, equal for all libraries.

    Raises
    ------
    RankError
        If ``rank`` is not a positive integer.
    SettingError
        If ``center`` is not a boolean, or ``seed`` not an integer of at least 0.

    Examples
    --------
    >>> import numpy as np
    >>> from ipa_core import IncrementalPCA, Learner
    >>> x = np.random.default_rng(0).standard_normal((100, 8)) / np.arange(1, 9)
    >>> here, there = IncrementalPCA(rank=2).update(x[:60]), IncrementalPCA(rank=2).update(x[60:])
    >>> here.merge(there).finalize()
    Projector(rank=2, features=8, captured=0.779, samples=100, numpy float64 on cpu)
    """

    guarantee: ClassVar[Guarantee]

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "update" in vars(cls):
            raise TypeError(
                f"expected {cls.__name__} to override begin_update, which every update goes "
                "through, got another update method"
            )

    @final
    def update(self, batch: Array, weights: Array | None = None) -> Self:
        """Learn from a batch of rows.

        Parameters
        ----------
        batch : array of shape (..., features)
            Real floating, in any library of the array API; half precision is computed in float32.
            Any leading shape, any number of rows, none included. The first batch fixes library,
            device, dtype and features. A sparse matrix of SciPy is a batch of NumPy's.
        weights : array of shape batch.shape[:-1], optional
            Non-negative weight of each row: a boolean mask, or floating importances. In any
            library and on any device.

        Returns
        -------
        Learner
            Itself.

        Raises
        ------
        ArrayTypeError, ShapeError, RankError, WeightError, NonFiniteError
            If the batch does not fit; the learner is then as it was before the call.
        """
        return self.begin_update(batch, weights).finish()

    def begin_update(self, batch: Array, weights: Array | None = None) -> PendingUpdate[Self]:
        """Start an update; `PendingUpdate.finish` completes it.

        The first half checks the form of the batch and queues the device work that does not depend
        on validation. `finish` waits for the results (whether every row is finite, and which rows
        are novel) and learns. Between the two the host can queue other work on the device.

        Parameters
        ----------
        batch, weights
            As for `update`. They must not change before the update is finished.

        Returns
        -------
        PendingUpdate
            The learner is as before until it is finished.

        Raises
        ------
        ArrayTypeError, ShapeError, RankError, WeightError
            If the batch does not fit.

        Examples
        --------
        >>> import numpy as np
        >>> from ipa_core import RandomizedSVD
        >>> learner = RandomizedSVD(rank=2)
        >>> pending = learner.begin_update(np.eye(4))
        >>> learner.samples, pending.finish().samples
        (0, 4)
        """
        if _sparse_rows.is_sparse(batch):
            batch = _sparse_rows.csr_rows(batch)
        template = self._template
        if template is None:
            template = template_of(batch, self.rank)
        with _torch_modes.isolated(template), _array.ignore_overflow():
            rows = validate(batch, weights, template, self._uncast_dtype)
            parts = align(rows.xp, self._pending, rows.x, self._block_rows)
            products = self._begin_sketch(rows.xp, parts)
            seen = [product.seen for product in products]
            squares = _array.squared_norms_async(rows.xp, (rows.x, *seen))
        begun = self.samples, self._template
        return PendingUpdate(self, begun, template, rows, parts, products, squares)

    @isolated_method
    def merge(self, other: Self) -> Self:
        """Return a new learner that has seen the rows of both; neither operand changes.

        Raises
        ------
        SettingError
            If the other is of another class or has other settings (seeds may differ).
        ShapeError, ArrayTypeError
            If the other has seen rows of other features, library or device.
        """
        check_mergeable(self, other, (name for name in self._settings if name != "seed"))
        if self._template is not None and other._template is not None:
            match(other._template, self._template)
        if other.samples == 0:
            return copy.copy(self)
        if self.samples == 0:
            return copy.copy(other)
        xp = self._xp
        merged, right = self._flushed(), other._flushed()
        if merged._mean is not None:
            difference, share = merged._move_mean(right._mean, right._weight)
            shift = merged._shift_row(xp, difference, share * right._weight)
            merged._energy += shift.energy()
            merged._absorb_shift(xp, shift)
        merged._absorb_summary(xp, right)
        merged.samples += right.samples
        merged._weight += right._weight
        merged._energy += right._energy
        return merged

    @isolated_method
    def finalize(self) -> Projector:
        """Return the projector of all rows seen so far; learning may go on.

        `Projector.samples` counts a row once, however many `passes` are made over it.

        Raises
        ------
        EmptyStreamError
            If no row (of positive weight) has been seen.
        """
        if self.samples == 0:
            raise EmptyStreamError(
                "expected at least one row of positive weight before finalize, got none; "
                "check that the stream yields batches and that the mask keeps some rows"
            )
        xp = self._xp
        done = self._flushed()
        directions, energies = done._solve(xp)
        mean, energy, weight = done._mean, done._energy, done._weight
        del done  # what the rows that waited have added to it
        # By rounding their sum may exceed the energy of the rows.
        energies = (
            energies * (energy / xp.clip(xp.sum(energies), min=energy)) if energy else energies
        )
        dtype = self._template.dtype
        return Projector(
            _array.cast(xp, fixed_basis(xp, directions), dtype),
            _array.cast(xp, xp.zeros_like(directions[0, :]) if mean is None else mean, dtype),
            _array.cast(xp, energies / weight, dtype),
            energy / weight,
            math.ceil(self.samples / self.passes),
        )

    @isolated_method
    def compact(self) -> Self:
        """Return a learner of the same rows in its smallest form: what is worth sending.

        Nothing is pending in it, and what it kept for the sake of speed is folded in; merging it
        is merging the learner.
        """
        done = self._flushed()
        if done.samples:
            done._condense(done._xp)
        return done

    @isolated_method
    def state_dict(self) -> dict[str, Any]:
        """Return settings, counts and arrays, from which `load_state_dict` goes on exactly.

        The arrays are those of the learner, not copies; `ipa_core.save_state` writes them to disk.
        """
        state: dict[str, Any] = {"learner": type(self).__name__}
        for name in self._settings + self._numbers:
            state[name.lstrip("_")] = getattr(self, name)
        if self._template is None:
            return state
        arrays = {name.lstrip("_"): getattr(self, name) for name in self._arrays}
        for name in self._values:
            arrays |= flatten(name.lstrip("_"), getattr(self, name))
        arrays["template"] = self._template
        if self._pending:
            rows = join(self._xp, self._pending)
            arrays["pending.x"], arrays["pending.weights"] = rows.x, rows.weights
        return state | {name: array for name, array in arrays.items() if array is not None}

    def load_state_dict(self, state: Mapping[str, Any]) -> Self:
        """Take over a state from `state_dict`, of a learner of the same class and settings.

        Raises
        ------
        FileFormatError
            If the state is another learner's or incomplete.
        SettingError
            If it was learned with other settings.
        """
        check_state_of(type(self), state)
        settings = {key: getattr(self, key) for key in self._settings}
        check_settings(state, settings)
        fresh = type(self)(**settings)
        check_state(
            state,
            numbers={
                name.lstrip("_"): type(getattr(fresh, name)).__name__ for name in self._numbers
            },
            arrays=[name.lstrip("_") for name in self._arrays],
            values={name.lstrip("_"): cls for name, cls in self._values.items()},
        )
        for number in self._numbers:
            setattr(fresh, number, state[number.lstrip("_")])
        for array in self._arrays:
            setattr(fresh, array, state.get(array.lstrip("_")))
        for name, cls in self._values.items():
            setattr(fresh, name, unflatten(name.lstrip("_"), cls, state))
        fresh._template = state.get("template")
        if "pending.x" in state:
            rows = Rows.of(fresh._xp, state["pending.x"], state.get("pending.weights"))
            fresh._pending = (rows,)
        self.__dict__ = fresh.__dict__
        return self

    def __repr__(self) -> str:
        settings = ", ".join(f"{name}={getattr(self, name)!r}" for name in self._settings)
        seen = (
            "no rows yet"
            if self.features is None
            else (f"{self.samples:,} rows of {self.features} features")
        )
        return f"<{type(self).__name__}({settings}): {seen}>"
