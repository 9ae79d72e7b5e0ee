"""The worked example on SmolLM2-135M with real weights, limited to a few steps."""

import pytest

from benchmarks import demo_trainer
from benchmarks.assets import smollm2
from benchmarks.demo_trainer import QUICK

pytestmark = [pytest.mark.assets, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def folder():
    pytest.importorskip("gguf", reason="the weights of SmolLM2 come as GGUF")
    return smollm2()


def test_trained_by_trainer_exported_and_loaded_by_stock_peft(folder, tmp_path):
    questions = demo_trainer.social_iqa()
    assert len(questions) > 2000
    results = demo_trainer.run(folder, questions, QUICK, tmp_path)
    assert results["layers"] == 30 * 7
    assert results["initial_logits_change"] < 1e-5
    assert results["stock_peft_logits_difference"] < 1e-5
