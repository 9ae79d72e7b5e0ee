"""Training by an unmodified transformers.Trainer."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

import ipa_hf

from .models import config, make, outputs, text_batches

pytestmark = pytest.mark.filterwarnings("ignore")  # raised by the trainer's dependencies


@pytest.fixture
def rows():
    return [
        {"input_ids": ids, "attention_mask": mask, "labels": ids}
        for batch in text_batches()
        for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)
    ]


def trainer(model, rows, folder, steps):
    return Trainer(
        model,
        TrainingArguments(
            str(folder),
            max_steps=steps,
            save_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=rows,
    )


def learned():
    return ipa_hf.get_ipa_model(make("llama"), config(), text_batches(), progress=False)


def lora_A_and_B(model, part):
    return {n: p.detach().clone() for n, p in model.named_parameters() if f"lora_{part}" in n}


def test_only_b_is_trained(rows, tmp_path):
    model = learned()
    a, b = lora_A_and_B(model, "A"), lora_A_and_B(model, "B")
    trainer(model, rows, tmp_path, 2).train()
    assert all(torch.equal(a[name], value) for name, value in lora_A_and_B(model, "A").items())
    assert not any(torch.equal(b[name], value) for name, value in lora_A_and_B(model, "B").items())


def test_checkpoints_are_adapters_with_metadata(rows, tmp_path):
    model = learned()
    trainer(model, rows, tmp_path, 2).train()
    again = ipa_hf.load_adapter(make("llama"), tmp_path / "checkpoint-2", is_trainable=True)
    batch = text_batches()[0]
    torch.testing.assert_close(outputs(again, batch), outputs(model, batch))
    assert not any(p.requires_grad for n, p in again.named_parameters() if "lora_A" in n)


def test_resumed_training_equals_training_at_one_go(rows, tmp_path):
    model = learned()
    trainer(model, rows, tmp_path, 4).train()
    resumed = learned()
    trainer(resumed, rows, tmp_path, 4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for part in "AB":
        expected = lora_A_and_B(model, part)
        for name, value in lora_A_and_B(resumed, part).items():
            torch.testing.assert_close(value, expected[name])
    assert not any(p.requires_grad for n, p in resumed.named_parameters() if "lora_A" in n)
