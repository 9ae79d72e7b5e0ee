"""TRL trains a model with a documented adapter: SFT, and DPO with a reference adapter."""

import pytest
import torch
from peft import LoraConfig

import ipa_hf

from .outcome import equal, lora

trl = pytest.importorskip("trl", reason="trl is not installed: make test-trainers")
datasets = pytest.importorskip("datasets")
TEXTS = [{"text": "a b c d e f"}, {"text": "f a m b c l d"}] * 4
PAIRS = [{"prompt": "a b c", "chosen": " d e f", "rejected": " l m"}] * 8
OPTIONS = dict(
    max_steps=4,
    save_steps=2,
    per_device_train_batch_size=2,
    learning_rate=1e-2,
    report_to=[],
    use_cpu=True,
    bf16=False,
)


def sft(model, task, folder):
    return trl.SFTTrainer(
        model=model,
        args=trl.SFTConfig(str(folder), **OPTIONS),
        train_dataset=datasets.Dataset.from_list(TEXTS),
        processing_class=task.tokenizer,
    )


def test_sft_of_a_loaded_adapter(task, tmp_path):
    model = task.documented_model()
    trainer = sft(model, task, tmp_path)
    trainer.train()
    trainer.save_model(tmp_path / "saved")
    task.check("TRL", "SFTTrainer, load_adapter", trl.__version__, tmp_path / "saved", model)


def test_sft_of_a_new_adapter(task, tmp_path):
    batches = [dict(task.tokenizer("a b c d e f", return_tensors="pt"))] * 4
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    model = ipa_hf.get_ipa_model(task.base(), config, batches, progress=False)
    a = lora(model, "A")
    sft(model, task, tmp_path).train()
    assert all(equal(lora(model, "A"), a))


def test_sft_resumes_from_its_checkpoint(task, tmp_path):
    first = task.documented_model()
    sft(first, task, tmp_path).train()
    resumed = task.documented_model()
    trainer = sft(resumed, task, tmp_path)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(equal(lora(resumed, "A"), lora(first, "A")))
    for name, b in lora(resumed, "B").items():
        torch.testing.assert_close(b, lora(first, "B")[name])
    result = tmp_path / "checkpoint-4"
    task.check("TRL", "SFTTrainer, resume_from_checkpoint", trl.__version__, result, resumed)


def test_dpo_with_a_reference_adapter(task, tmp_path):
    model = task.documented_model()
    trainer = trl.DPOTrainer(
        model=model,
        args=trl.DPOConfig(str(tmp_path), **OPTIONS),
        train_dataset=datasets.Dataset.from_list(PAIRS),
        processing_class=task.tokenizer,
    )
    assert "ref" in model.peft_config  # TRL's copy of the adapter before training
    trainer.train()
    references = {n: p for n, p in model.named_parameters() if ".ref." in n}
    assert references and not any(p.requires_grad for p in references.values())
    trainer.save_model(tmp_path / "saved")
    task.check("TRL", "DPOTrainer, reference adapter", trl.__version__, tmp_path / "saved", model)
