"""The worked example on SmolLM2-135M with its real weights, cut to a few steps."""

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks import demo_trainer
from benchmarks.assets import smollm2
from benchmarks.demo_trainer import QUICK

pytestmark = [pytest.mark.assets, pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def folder():
    pytest.importorskip("gguf", reason="the weights of SmolLM2 come as GGUF; see make bench")
    return smollm2()


def test_trained_by_trainer_exported_and_loaded_by_stock_peft(folder, tmp_path, capsys):
    questions = demo_trainer.social_iqa()
    assert len(questions) > 2000
    model = demo_trainer.run(folder, questions, QUICK, tmp_path)
    change = capsys.readouterr().out.split("at most ")[1].split(".\n")[0]
    assert float(change) < 1e-5
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = demo_trainer.collate([demo_trainer.encoded(tokenizer, questions[0], 0)])
    stock = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(folder), tmp_path / "adapter"
    )
    found, expected = (demo_trainer.logits(x, batch) for x in (stock, model))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
