"""Faulty learners that the laws must catch."""

from dataclasses import replace

import numpy as np
import pytest

from ipa_core import ExactCovariance, HebbianRule, IncrementalPCA, IPAError, RandomizedSVD
from ipa_core.learners._row_blocks import Rows
from ipa_core.learners._second_moment import SecondMoment
from ipa_core.learners.base import Learner
from tests.core import contract
from tests.core.spectra import Stream

STREAM = Stream(
    features=36,
    rank=3,
    rows=7000,
    decay=0.7,
    scale=1.0,
    offset=1.0,
    effective=36,
    seed=3,
    cuts=(0.2, 0.2, 0.55),
)


class LastBlockOnly(ExactCovariance):
    """Replaces the moment where it should add to it."""

    def _add(self, xp, moment):
        self._moment = moment


class WrongFactor(ExactCovariance):
    """Takes every block after the first for half of what it is."""

    def _add(self, xp, moment):
        super()._add(
            xp, moment if self._moment is None else replace(moment, array=moment.array / 2)
        )


class NoMeanCorrection(ExactCovariance):
    """Centers each block about its own mean and forgets that the means differ."""

    def _move_mean(self, mean, weight):
        difference, share = super()._move_mean(mean, weight)
        return 0 * difference, share


class SquaredWeights(ExactCovariance):
    """Lets each weight enter twice."""

    def _absorb_rows(self, xp, rows):
        self._add(xp, SecondMoment.of(xp, rows.apply_weights(rows.x)))


class PaddingCounted(ExactCovariance):
    """Looks at rows of weight zero."""

    def begin_update(self, batch, weights=None):
        return super().begin_update(batch, None)


class ForgetsOther(IncrementalPCA):
    """Counts the other learner's rows but not what they hold."""

    def _absorb_summary(self, xp, other):
        pass


class WritesInPlace(RandomizedSVD):
    """Changes the image where it should rebind."""

    def _absorb_rows(self, xp, rows):
        if self._segment is not None:
            self._segment.image[:] *= 1.5
        super()._absorb_rows(xp, rows)


class ScaleBlind(HebbianRule):
    """Steps by a fixed amount, whatever the scale of the data."""

    def _step(self, xp, rows, weight, size):
        super()._step(xp, Rows.of(xp, rows.x * self._unit, rows.weights), weight, size)


class NoBlocks(IncrementalPCA):
    """Absorbs batches as they are cut, keeping no more than the rank."""

    def _absorb_whole_blocks(self, xp, rows, parts, sketch):
        if rows.count:
            self._absorb_block(xp, rows)

    def _stack(self, xp, rows):
        super()._stack(xp, rows)
        self._factor = self._factor[: self.rank, :]


class LosesPending(ExactCovariance):
    """Drops the rows that wait for a full block."""

    def _flushed(self):
        done = super()._flushed()
        return self if self._moment is not None else done


def broken(factory):
    """Return the names of the laws that a factory breaks."""
    names = []
    for law in contract.LAWS:
        try:
            law(np, factory, STREAM, "float64")
        except (AssertionError, IPAError):
            names.append(law.__name__)
    return names


@pytest.mark.parametrize(
    "learner_class", [ExactCovariance, HebbianRule, IncrementalPCA, RandomizedSVD]
)
@pytest.mark.parametrize("center", [False, True])
def test_right_learners_break_no_law(learner_class, center):
    assert broken(lambda rank: learner_class(rank, center=center)) == []


@pytest.mark.parametrize(
    ("mutant", "center", "law"),
    [
        (LastBlockOnly, False, "law_optimality"),
        (WrongFactor, False, "law_optimality"),
        (NoMeanCorrection, True, "law_optimality"),
        (SquaredWeights, False, "law_weights"),
        (PaddingCounted, False, "law_absence"),
        (ForgetsOther, False, "law_merge"),
        (WritesInPlace, False, "law_purity"),
        (ScaleBlind, False, "law_equivariance"),
        (NoBlocks, False, "law_partition"),
        (LosesPending, False, "law_optimality"),
    ],
)
def test_mutant_is_caught(mutant, center, law):
    assert issubclass(mutant, Learner)
    assert law in broken(lambda rank: mutant(rank, center=center))
