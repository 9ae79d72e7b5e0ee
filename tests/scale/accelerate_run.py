"""Learning as users of accelerate have it, started by its launcher for the CPU: FOLDER SIZE."""

import sys
from pathlib import Path

import torch
from accelerate import Accelerator, debug_launcher
from torch.utils.data import DataLoader, TensorDataset

from ipa_torch import fit_projectors
from tests.scale import runs


def main(folder):
    """Prepare model and loader, learn, save."""
    accelerator = Accelerator(cpu=True)
    images = torch.cat(runs.batches(8))
    model, loader = accelerator.prepare(runs.model(), DataLoader(TensorDataset(images), 24))
    projectors = fit_projectors(model, loader, 3, targets=["query", "value", "out"], progress=False)
    path = folder / f"{accelerator.process_index}-of-{accelerator.num_processes}.safetensors"
    projectors.save(path)
    accelerator.end_training()


if __name__ == "__main__":
    debug_launcher(main, (Path(sys.argv[1]),), num_processes=int(sys.argv[2]))
