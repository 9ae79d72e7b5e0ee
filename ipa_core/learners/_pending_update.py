"""Update of a learner between its two halves."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Generic, TypeVar

from ipa_core._array import Array, HostArray
from ipa_core.learners._row_blocks import Product
from ipa_core.learners._validation import PendingBatch

if TYPE_CHECKING:
    from ipa_core.learners._block_learner import BlockLearner

LearnerT = TypeVar("LearnerT", bound="BlockLearner")


@dataclass(frozen=True)
class PendingUpdate(Generic[LearnerT]):
    """Update whose device work is queued; `finish` waits for it and learns.

    Parameters
    ----------
    learner : Learner
        As before the update until `finish` returns.
    begun : tuple
        Samples and template of the learner when the update began.
    template : array of shape (0, features)
        The learner's template afterwards.
    batch : PendingBatch
        The rows.
    parts : tuple of array
        The rows that are due, in whole blocks but for the last rows: a block of rows that waited
        and the first of these, and the others.
    products : tuple of Product
        Products of leading rows that do not depend on validation.
    squares : callable
        Waits for the squared lengths of the rows, and of the rows of the products.
    """

    learner: LearnerT
    begun: tuple[int, Array]
    template: Array
    batch: PendingBatch
    parts: tuple[Array, ...]
    products: tuple[Product, ...]
    squares: Callable[[], list[HostArray]]

    def finish(self) -> LearnerT:
        """Complete the update; return the learner.

        Raises
        ------
        NonFiniteError
            If the batch holds values that are not finite; the learner is then as before.
        IPAError
            If the learner has learned other rows since the update began.
        """
        return self.learner._finish_update(self)
