"""transformers.Trainer trains the documented model and resumes from its checkpoint."""

import torch
import transformers

from .outcome import equal, lora


def trainer(model, folder):
    row = {"input_ids": torch.tensor([2, 3, 4, 5, 6]), "labels": torch.tensor([2, 3, 4, 5, 6])}
    arguments = transformers.TrainingArguments(
        str(folder),
        max_steps=4,
        save_steps=2,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        report_to=[],
        use_cpu=True,
    )
    return transformers.Trainer(model, arguments, train_dataset=[row] * 8)


def test_trains_and_resumes(task, tmp_path):
    model = task.documented_model()
    trainer(model, tmp_path).train()
    resumed = task.documented_model()
    trainer(resumed, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert all(equal(lora(resumed, "A"), lora(model, "A")))
    for name, b in lora(resumed, "B").items():
        torch.testing.assert_close(b, lora(model, "B")[name])
    version = transformers.__version__
    for folder, case in (("checkpoint-2", None), ("checkpoint-4", resumed)):
        task.check("transformers", f"Trainer, {folder}", version, tmp_path / folder, case)
