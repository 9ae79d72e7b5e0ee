"""Fit with checkpoints, slow enough to be killed: FOLDER."""

import sys
import time
from pathlib import Path

from ipa_torch import CheckpointConfig, StoppingCriteria, fit_projectors
from tests.scale import runs

COUNT = 40


def main(folder, pause=0.01):
    """Fit, and save the projectors at the end."""

    def forward(model, batch):
        time.sleep(pause)
        model(batch)

    folder = Path(folder)
    projectors = fit_projectors(
        runs.model(),
        runs.batches(COUNT),
        4,
        targets=lambda name, module: hasattr(module, "weight"),
        max_patches=50,
        stop=StoppingCriteria(tolerance=1e-6),
        checkpoint=CheckpointConfig(folder / "checkpoints", batches=1),
        forward=forward,
        progress=False,
    )
    projectors.save(folder / "done.safetensors")


if __name__ == "__main__":
    main(sys.argv[1])
