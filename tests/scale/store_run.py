"""Writer of an activation store, slow enough to be killed: FOLDER."""

import sys
import time

from ipa_torch import store_activations
from tests.scale import runs

COUNT = 40


def main(folder, pause=0.01):
    """Store the inputs of the small model's layers, two batches a shard."""

    def forward(model, batch):
        time.sleep(pause)
        model(batch)

    return store_activations(
        runs.model(),
        runs.batches(COUNT),
        folder,
        targets=lambda name, module: hasattr(module, "weight"),
        max_patches=50,
        shard_bytes=20_000,
        forward=forward,
        progress=False,
    )


if __name__ == "__main__":
    main(sys.argv[1])
