"""Script of one rank: initialize from a shard of the data and save all A to FOLDER."""

import sys
from pathlib import Path

import torch
from torch import distributed

import ipa_hf
from ipa_core import ExactCovariance

from .models import config, make, text_batches


def learned(batches):
    """Return the A of all layers of a model initialized from these batches."""
    model = ipa_hf.get_ipa_model(
        make("llama"), config(), batches, learner=ExactCovariance, progress=False
    )
    return {name: p.detach() for name, p in model.named_parameters() if "lora_A" in name}


def main(folder):
    distributed.init_process_group("gloo")
    rank, world_size = distributed.get_rank(), distributed.get_world_size()
    torch.save(learned(text_batches()[rank::world_size]), Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
