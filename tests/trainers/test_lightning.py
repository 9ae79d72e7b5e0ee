"""Lightning trains the documented model, and resumes from its checkpoint."""

import pytest
import torch

from .outcome import equal, lora

lightning = pytest.importorskip(
    "lightning", reason="lightning is not installed: make test-trainers"
)
ROWS = [{"input_ids": torch.tensor([2, 3, 4, 5, 6]), "labels": torch.tensor([2, 3, 4, 5, 6])}] * 8


class Module(lightning.LightningModule):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch, number):
        return self.model(**batch).loss

    def configure_optimizers(self):
        trained = [p for p in self.parameters() if p.requires_grad]
        return torch.optim.AdamW(trained, lr=1e-2)


def fit(model, folder, steps, checkpoint=None):
    trainer = lightning.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_progress_bar=False,
        default_root_dir=folder,
    )
    loader = torch.utils.data.DataLoader(ROWS, batch_size=2)
    module = Module(model)
    trainer.fit(module, loader, ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / f"{steps}.ckpt")
    return module.model


def test_trains_and_resumes(task, tmp_path):
    model = fit(task.documented_model(), tmp_path, 4)
    model.save_pretrained(tmp_path / "saved")
    task.check("Lightning", "Trainer", lightning.__version__, tmp_path / "saved", model)
    fit(task.documented_model(), tmp_path, 2)
    resumed = fit(task.documented_model(), tmp_path, 4, tmp_path / "2.ckpt")
    assert all(equal(lora(resumed, "A"), lora(model, "A")))
    for name, b in lora(resumed, "B").items():
        torch.testing.assert_close(b, lora(model, "B")[name])
