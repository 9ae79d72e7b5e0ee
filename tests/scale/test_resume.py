"""Learning that is interrupted, killed or damaged on the way."""

import random
import shutil

import pytest

from ipa_core import HebbianRule, RandomizedSVD, load_state, save_state
from ipa_core.errors import FileFormatError, SettingError, StreamError
from ipa_torch import CheckpointConfig, LayerProjectors, StoppingCriteria, fit_projectors
from ipa_torch._fit.learner_bytes import measure_learner_bytes
from tests.scale import fit_run, runs


class Stop(Exception):
    """The machine fails."""


def learn(batches, folder, stop_after=None, every=1, **options):
    """Learn over the small model; fail after so many forward passes."""
    passed = 0

    def forward(model, batch):
        nonlocal passed
        if passed == stop_after:
            raise Stop
        passed += 1
        model(batch)

    checkpoint = None if folder is None else CheckpointConfig(folder, batches=every)
    projectors = fit_projectors(
        runs.model(),
        batches,
        4,
        targets=lambda name, module: hasattr(module, "weight"),
        max_patches=50,
        checkpoint=checkpoint,
        forward=forward,
        progress=False,
        **options,
    )
    return projectors, passed


@pytest.mark.parametrize(
    "options", [{}, {"stop": StoppingCriteria(tolerance=1e-6)}, {"learner": HebbianRule}]
)
@pytest.mark.parametrize("moment", [1, 7, 19])
def test_result_is_that_of_an_uninterrupted_run(tmp_path, moment, options):
    batches = runs.batches(20)
    whole, _ = learn(batches, None, **options)
    with pytest.raises(Stop):
        learn(batches, tmp_path, stop_after=moment, **options)
    again, passed = learn(batches, tmp_path, **options)
    assert passed == 20 - moment
    assert runs.same(again, whole)
    assert again.shared == whole.shared
    assert again.stopped == whole.stopped


def test_what_was_learned_since_the_last_checkpoint_is_learned_again(tmp_path):
    batches = runs.batches(20)
    with pytest.raises(Stop):
        learn(batches, tmp_path, stop_after=13, every=5)
    again, passed = learn(batches, tmp_path, every=5)
    assert passed == 10
    assert runs.same(again, learn(batches, None)[0])


def test_a_finished_run_is_not_run_again(tmp_path):
    batches = runs.batches(5)
    whole, _ = learn(batches, tmp_path, every=3)
    again, passed = learn(batches, tmp_path, every=3)
    assert passed == 0
    assert runs.same(again, whole)


def test_layers_that_have_stopped_or_are_unfit_stay_so(tmp_path):
    batches = runs.batches(20)
    batches[3][0, 0, 0, 0] = 1000.0
    options = {"stop": StoppingCriteria(on_error="return", max_rows=300)}
    with pytest.warns(UserWarning, match="finite"):
        whole, _ = learn(batches, None, **options)
    with pytest.warns(UserWarning):
        learn(batches, tmp_path, stop_after=8, **options)
    with pytest.warns(UserWarning, match="finite"):
        again, _ = learn(batches, tmp_path, **options)
    assert again.missing.keys() == whole.missing.keys() == {"out"}
    assert again.stopped == whole.stopped
    assert runs.same(again, whole)


def test_turns_have_checkpoints_of_their_own(tmp_path):
    batches = runs.batches(6)
    options = {"max_bytes": measure_learner_bytes(RandomizedSVD, 4, 72, False)}  # the largest one's
    whole, _ = learn(batches, None, **options)
    assert whole.passes > 1
    with pytest.raises(Stop):
        # One forward pass more finds out which layers share their inputs.
        learn(batches, tmp_path, stop_after=10, **options)
    again, passed = learn(batches, tmp_path, **options)
    assert passed < 6 * whole.passes
    assert runs.same(again, whole)


def test_other_batches_are_refused(tmp_path):
    batches = runs.batches(10)
    with pytest.raises(Stop):
        learn(batches, tmp_path, stop_after=4)
    with pytest.raises(StreamError, match="same order"):
        learn(batches[::-1], tmp_path)
    with pytest.raises(StreamError, match="got 3"):
        learn(batches[:3], tmp_path)


def test_another_run_is_refused(tmp_path):
    batches = runs.batches(5)
    learn(batches, tmp_path)
    with pytest.raises(SettingError, match="tolerance"):
        learn(batches, tmp_path, stop=StoppingCriteria(tolerance=0.1))
    with pytest.raises(FileFormatError, match="HebbianRule"):
        learn(batches, tmp_path, learner=HebbianRule)
    with pytest.raises(SettingError, match="above 0"):
        CheckpointConfig(tmp_path, batches=0)


def test_checkpoints_of_another_format_version_are_refused(tmp_path):
    batches = runs.batches(5)
    learn(batches, tmp_path)
    for index in tmp_path.glob("step-*/index.safetensors"):
        state = load_state(index)
        del state["format_version"]  # the first version had none
        save_state(state, index)
    with pytest.raises(FileFormatError, match="expected format version 4, got 1"):
        learn(batches, tmp_path)


def test_damaged_checkpoints_are_named_and_never_loaded(tmp_path):
    batches = runs.batches(6)
    whole, _ = learn(batches, tmp_path / "good", every=2)
    rng = random.Random(0)
    files = sorted((tmp_path / "good" / "step-0000000006").iterdir())
    for number in range(60):
        shutil.copytree(tmp_path / "good", tmp_path / "bad")
        victim = tmp_path / "bad" / "step-0000000006" / rng.choice(files).name
        data = bytearray(victim.read_bytes())
        at = rng.randrange(len(data))
        if number % 3 == 0:
            victim.unlink()
        elif number % 3 == 1:
            victim.write_bytes(data[:at])
        else:
            data[at] ^= 1 << rng.randrange(8)
            victim.write_bytes(data)
        with pytest.raises(FileFormatError, match="resume from step-0000000004.*are lost"):
            learn(batches, tmp_path / "bad", every=2)
        shutil.rmtree(tmp_path / "bad" / "step-0000000006")
        if number < 2:
            assert runs.same(learn(batches, tmp_path / "bad", every=2)[0], whole)
        shutil.rmtree(tmp_path / "bad")


@pytest.mark.slow
def test_kill_at_any_moment(tmp_path):
    """A run that is killed by -9 until it completes equals an uninterrupted run."""
    rng, done = random.Random(0), tmp_path / "done.safetensors"
    for _ in range(3):
        process = runs.start("fit_run", tmp_path)
        seen = set()
        wanted = rng.choice([2, 4, 9])

        def moment(seen=seen, wanted=wanted):
            seen.update(path.name for path in (tmp_path / "checkpoints").glob("step-*"))
            return len(seen) >= wanted + 2

        runs.until(moment, process)
        runs.kill(process)
    assert not done.exists()
    process = runs.start("fit_run", tmp_path)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    (tmp_path / "whole").mkdir()
    fit_run.main(tmp_path / "whole", pause=0)
    assert runs.same(
        LayerProjectors.load(done), LayerProjectors.load(tmp_path / "whole/done.safetensors")
    )
