"""Base class of the learners, and the laws that they obey."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from functools import wraps
from typing import Any, ClassVar, Self, TypeVar, cast, final

from ipa_core import _array, _settings, _sparse_rows, _torch_modes
from ipa_core._array import Array, Namespace
from ipa_core._linalg import fixed_basis
from ipa_core.errors import (
    EmptyStreamError,
    FileFormatError,
    IPAError,
    RankError,
    SettingError,
)
from ipa_core.learners._pending_update import PendingUpdate
from ipa_core.learners._row_blocks import (
    Product,
    RowChunks,
    Rows,
    Sketch,
    align,
    align_rows,
    join,
)
from ipa_core.learners._state import check_arrays, check_numbers, entries_of, flatten, unflatten
from ipa_core.learners._validation import match, template_of, validate
from ipa_core.learners.guarantee import Guarantee
from ipa_core.projector import Projector

Method = TypeVar("Method", bound=Callable[..., Any])


def isolated(method: Method) -> Method:
    """Let a learner's method run outside torch's autocast and inference mode."""

    @wraps(method)
    def run(learner: Learner, *args: Any) -> Any:
        with _torch_modes.isolated(learner._template):
            return method(learner, *args)

    return cast(Method, run)


class Learner(ABC):
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
    #: Number of passes over the stream that the learner asks for.
    passes: int = 1

    _settings: ClassVar[tuple[str, ...]] = ("rank", "center", "seed")
    _numbers: ClassVar[tuple[str, ...]] = ("samples", "_weight", "_energy")
    _arrays: ClassVar[tuple[str, ...]] = ("_mean",)
    #: Attributes that hold a dataclass (or None), and its class.
    _values: ClassVar[Mapping[str, type]] = {}

    def __init__(self, rank: int, *, center: bool = False, seed: int = 0) -> None:
        self.rank = _settings.rank(rank)
        self.center = _settings.boolean("center", center)
        self.seed = _settings.integer("seed", seed, least=0)
        self.samples = 0
        self._weight = 0.0
        self._energy = 0.0
        self._template: Array = None  # (0, features): library, device, dtype, features
        self._mean: Array = None
        self._pending: tuple[Rows, ...] = ()

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "update" in vars(cls):
            raise TypeError(
                f"expected {cls.__name__} to override begin_update, which every update goes "
                "through, got another update method"
            )

    # Methods of a subclass ----------------------------------------------------------------------

    @property
    @abstractmethod
    def _block_rows(self) -> int:
        """Number of rows in a block, however the batches are cut."""

    @abstractmethod
    def _absorb_rows(self, xp: Namespace, rows: Rows) -> None:
        """Fold a block of rows into the summary, by rebinding attributes."""

    def _absorb_chunks(self, xp: Namespace, chunks: RowChunks) -> None:
        """Fold whole blocks into the summary. Default: one by one."""
        for start in range(0, chunks.count, self._block_rows):
            self._absorb_block(xp, chunks.cut(start, start + self._block_rows).joined(xp))

    def _begin_sketch(self, xp: Namespace, parts: tuple[Array, ...]) -> tuple[Product, ...]:
        """Start products of rows that are not validated yet. Default: none."""
        return ()

    def _absorb_shift(self, xp: Namespace, shift: Rows) -> None:
        """Fold in the one row that stands for the distance of two means."""
        self._absorb_rows(xp, shift)

    @abstractmethod
    def _absorb_summary(self, xp: Namespace, other: Self) -> None:
        """Fold the summary of another learner, which has nothing pending, into this one's."""

    def _condense(self, xp: Namespace) -> None:
        """Reduce the state to its smallest form. Default: it is already."""
        return None

    @abstractmethod
    def _solve(self, xp: Namespace) -> tuple[Array, Array]:
        """Return ``rank`` orthogonal directions of any length, and energies summed over rows."""

    # Public methods -----------------------------------------------------------------------------

    @property
    def features(self) -> int | None:
        """Features of a row; None before the first batch."""
        return None if self._template is None else int(self._template.shape[1])

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
        template = self._template_for(batch)
        with _torch_modes.isolated(template), _array.ignore_overflow():
            rows = validate(batch, weights, template)
            parts = align(rows.xp, self._pending, rows.x, self._block_rows)
            products = self._begin_sketch(rows.xp, parts)
            seen = [product.seen for product in products]
            squares = _array.squared_norms_async(rows.xp, (rows.x, *seen))
        begun = self.samples, self._template
        return PendingUpdate(self, begun, template, rows, parts, products, squares)

    @isolated
    def merge(self, other: Self) -> Self:
        """Return a new learner that has seen the rows of both; neither operand changes.

        Raises
        ------
        SettingError
            If the other is of another class or has other settings (seeds may differ).
        ShapeError, ArrayTypeError
            If the other has seen rows of other features, library or device.
        """
        self._check_mergeable(other)
        if other.samples == 0:
            return copy.copy(self)
        if self.samples == 0:
            return copy.copy(other)
        xp = self._xp
        merged, right = self._flushed(), other._flushed()
        if merged._mean is not None:
            shift = merged._move_mean(xp, right._mean, right._weight)
            merged._energy += shift.energy()
            merged._absorb_shift(xp, shift)
        merged._absorb_summary(xp, right)
        merged.samples += right.samples
        merged._weight += right._weight
        merged._energy += right._energy
        return merged

    @isolated
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
        like = done._template
        mean = xp.zeros_like(directions[0, :]) if done._mean is None else done._mean
        return Projector(
            _array.cast(xp, fixed_basis(xp, directions), like.dtype),
            _array.cast(xp, mean, like.dtype),
            _array.cast(xp, energies / done._weight, like.dtype),
            done._energy / done._weight,
            math.ceil(done.samples / done.passes),
        )

    @isolated
    def compact(self) -> Self:
        """Return a learner of the same rows in its smallest form: what is worth sending.

        Nothing is pending in it, and what it kept for the sake of speed is folded in; merging it
        is merging the learner.
        """
        done = self._flushed()
        if done.samples:
            done._condense(done._xp)
        return done

    @isolated
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
        name = state.get("learner") if isinstance(state, Mapping) else type(state).__name__
        if not isinstance(name, str) or name != type(self).__name__:
            raise FileFormatError(f"expected the state of a {type(self).__name__}, got {name!r}")
        for setting in self._settings:
            if repr(state.get(setting)) != repr(getattr(self, setting)):
                raise SettingError(
                    f"expected a state learned with {setting}={getattr(self, setting)!r}, got "
                    f"{state.get(setting)!r}; build the learner with the state's settings"
                )
        fresh = type(self)(**{key: getattr(self, key) for key in self._settings})
        self._check_state(state)
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

    # Internals ----------------------------------------------------------------------------------

    @property
    def _xp(self) -> Namespace:
        return _array.namespace(self._template)

    def _check_state(self, state: Mapping[str, Any]) -> None:
        """Check the form of the entries of a state."""
        check_numbers(state, [number.lstrip("_") for number in self._numbers])
        template = state.get("template")
        if template is None:
            if state["samples"]:
                raise FileFormatError("expected the arrays of a learner with rows, got none")
            return
        if not _array.is_array(template) or template.ndim != 2 or template.shape[0] != 0:
            raise FileFormatError("expected a template of shape (0, features) in the state")
        arrays = [array.lstrip("_") for array in self._arrays]
        check_arrays(state, ["template", "pending.x", "pending.weights", *arrays])
        for name, cls in self._values.items():
            numbers, arrays = entries_of(name.lstrip("_"), cls)
            if any(key in state for key in (*numbers, *arrays)):
                check_numbers(state, numbers)
                check_arrays(state, arrays)

    def _template_for(self, batch: Array) -> Array:
        """Return what batches have to be like; the first one says it."""
        if self._template is not None:
            return self._template
        with _torch_modes.isolated(batch):
            template = template_of(batch)
        if self.rank > template.shape[1]:
            raise RankError(
                f"expected a rank of at most {template.shape[1]}, the number of features, "
                f"got {self.rank}; ask for a smaller rank"
            )
        return template

    def _finish_update(self, update: PendingUpdate[Self]) -> Self:
        if self.samples != update.begun[0] or self._template is not update.begun[1]:
            raise IPAError(
                "expected an update to be finished before another one of the same learner begins, "
                "got rows learned in between; finish the first one first"
            )
        before = self.__dict__.copy()
        try:
            with _torch_modes.isolated(update.template):
                self._learn(update)
        except BaseException:
            self.__dict__ = before
            raise
        return self

    def _learn(self, update: PendingUpdate[Self]) -> None:
        """Wait for the norms of the rows, and absorb the rows."""
        with _array.ignore_overflow():
            squares, *seen = update.squares()
            rows = update.batch.result(squares)
        self._template = update.template
        self.samples += rows.count
        sketch = Sketch(update.products, _array.host_concat(seen)) if seen else None
        self._absorb_whole_blocks(update.batch.xp, rows, update.parts, sketch)

    def _absorb_whole_blocks(
        self, xp: Namespace, rows: Rows, parts: tuple[Array, ...], sketch: Sketch | None
    ) -> None:
        """Absorb rows in blocks of the fixed size; the rest waits."""
        chunks = align_rows(xp, self._pending, rows, parts)
        full = self._whole_rows(chunks.count)
        if full:
            self._absorb_chunks(xp, RowChunks(chunks.parts, sketch).cut(0, full))
            rest = chunks.cut(full, chunks.count).parts
            self._pending = tuple(part.copy(xp) for part in rest)
        elif rows.count:
            self._pending = (*self._pending, rows.copy(xp))

    def _whole_rows(self, count: int) -> int:
        """Return how many of so many rows are in whole blocks."""
        return count - count % self._block_rows

    def _flushed(self) -> Self:
        """Return a copy with nothing pending."""
        done = copy.copy(self)
        if done._pending:
            xp = done._xp
            block, done._pending = join(xp, done._pending), ()
            done._absorb_block(xp, block)
        return done

    def _absorb_block(self, xp: Namespace, rows: Rows) -> None:
        weight = rows.total_weight()
        if self.center:
            rows = self._centered(xp, rows, weight)
        self._weight += weight
        self._energy += rows.energy()
        self._absorb_rows(xp, rows)

    def _centered(self, xp: Namespace, rows: Rows, weight: float) -> Rows:
        """Return the block about its own mean, and the jump of the mean as one more row.

        The scatter of two groups about their common mean is the sum of the scatters about their
        own means and of W w / (W + w) times the outer square of the difference of the means: one
        row, after which no algorithm needs to handle centering.
        """
        # About its first row the block is small, whatever the mean: no digits cancel.
        pilot = rows.x[0, :]
        x = rows.x - pilot
        offset = xp.sum(rows.apply_weights(x), axis=0) / weight
        x = x - offset
        wide = _array.wide_dtype(xp, _array.device(x))
        mean = _array.cast(xp, pilot, wide) + _array.cast(xp, offset, wide)
        centered = Rows.of(xp, x, rows.weights)
        if self._mean is None:
            self._mean = mean
            return centered
        return join(xp, (centered, self._move_mean(xp, mean, weight)))

    def _move_mean(self, xp: Namespace, mean: Array, weight: float) -> Rows:
        """Take another group's mean into the running one; return the row that stands for it."""
        total = self._weight + weight
        difference = mean - self._mean
        self._mean = self._mean + difference * (weight / total)
        row = difference * math.sqrt(self._weight * weight / total)
        return Rows.of(xp, _array.cast(xp, row, self._template.dtype)[None, :])

    def _check_mergeable(self, other: Self) -> None:
        if type(other) is not type(self):
            raise SettingError(
                f"expected a {type(self).__name__} to merge with, got {type(other).__name__}"
            )
        for name in self._settings:
            if name != "seed" and getattr(self, name) != getattr(other, name):
                raise SettingError(
                    f"expected learners of equal {name} to merge, got {getattr(self, name)!r} "
                    f"and {getattr(other, name)!r}"
                )
        if self._template is not None and other._template is not None:
            match(other._template, self._template)
