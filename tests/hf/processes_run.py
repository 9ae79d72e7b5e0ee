"""What each of several processes does: FOLDER. It learns from its share and saves the A of all."""

import sys
from pathlib import Path

import torch
from torch import distributed

import ipa_hf
from ipa_core import ExactCovariance

from .models import config, make, text_batches


def learned(batches):
    """Return the A of all layers of a model begun with these batches."""
    model = ipa_hf.get_ipa_model(
        make("llama"), config(), batches, learner=ExactCovariance, progress=False
    )
    return {name: p.detach() for name, p in model.named_parameters() if "lora_A" in name}


def main(folder):
    distributed.init_process_group("gloo")
    rank, size = distributed.get_rank(), distributed.get_world_size()
    torch.save(learned(text_batches()[rank::size]), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
