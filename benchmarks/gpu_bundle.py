"""Bundle of stage ``study`` of `benchmarks.gpu`: python -m benchmarks.gpu_bundle .bundle

A machine with a GPU often has no package index. The bundle holds all that the study needs there:
the weights, the embeddings of the tokens that occur, the texts as tokens, the order in which each
seed trains on them, and A of each method and seed, learned here. A and embeddings are bfloat16, and
weights become it there; A is trained in float32. Files have 58 MB at most.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel

from benchmarks.assets import cache_folder, smollm2
from benchmarks.evidence import bundle
from benchmarks.evidence.corpora import Corpus, corpus
from benchmarks.evidence.likelihood_methods import LIKELIHOOD
from benchmarks.evidence.likelihood_task import LikelihoodTask
from benchmarks.evidence.methods import Adapter
from benchmarks.evidence.task import Example, Settings, batches
from benchmarks.evidence.training import BATCHES
from benchmarks.likelihood import SIZES
from ipa_hf.lora_layers import lora_A_and_B, lora_layers

FOLDER = Path(".bundle")
COMMAND = "python -m benchmarks.gpu_bundle"
#: Fields of a configuration that the blocks depend on.
FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "hidden_act",
    "max_position_embeddings",
    "rms_norm_eps",
    "rope_parameters",
)


@dataclass(frozen=True)
class Plan:
    """Methods in their order, with what a study of them takes.

    Parameters
    ----------
    methods : sequence of str
    steps, seeds : int
    checkpoints : sequence of int
        Steps after which validation texts are looked at, beside the last.
    """

    methods: tuple[str, ...] = (
        "LoRA",
        "IPA without first token, frozen",
        "random A, frozen",
        "IPA without first token, long rows, trainable",
        "LoRA, half rank",
        "EVA",
    )
    steps: int = 2000
    seeds: int = 3
    checkpoints: tuple[int, ...] = (80, 150, 400)


#: What a rehearsal runs, on `toy_task`.
TINY = Plan(Plan().methods[:3], steps=12, seeds=2, checkpoints=(4,))


def write(
    plan: Plan, task: LikelihoodTask, settings: Settings, model: Path, folder: Path
) -> list[Path]:
    """Write the bundle of a plan, with the weights in a model's folder; return its files."""
    body, output = task.fresh(0).body, task.fresh(0).output
    stored = AutoModel.from_pretrained(model, dtype=torch.float32)
    known = torch.unique(torch.cat([ids for rows in task.tokens.values() for ids, _ in rows]))
    tensors = {
        f"weights/{name}": tensor
        for name, tensor in stored.state_dict().items()
        if not name.startswith("embed_tokens")
    }
    tensors |= {"embedding": body.embed_tokens.weight[known], "output": output.weight}
    for part in task.parts:
        tensors |= {f"{part}/{name}": each for name, each in _texts(task, part, known).items()}
    tensors["order"] = _order(plan, task, settings)
    starts, adapter = [], Adapter(task, settings)
    for method in plan.methods:
        for seed in range(plan.seeds):
            model, spent = adapter(LIKELIHOOD[method], seed)
            for name, a in _matrices(model).items():
                tensors[f"a/{len(starts)}/{name}"] = a.to(output.weight.dtype)
            scaling = {name: layer.scaling["default"] for name, layer in _layers(model).items()}
            kept = {"trainable": LIKELIHOOD[method].trainable, "spent": spent, "scaling": scaling}
            starts.append({"method": method, "seed": seed, **kept})
            print(f"{method}, seed {seed}: worth {spent:g} steps", flush=True)
    described = {
        "kinds": task.kinds,
        "config": {name: getattr(body.config, name) for name in FIELDS},
        "rank": settings.rank,
        "warmup": settings.warmup,
        "starts": starts,
    }
    return bundle.write(folder, described, tensors)


def _layers(model: nn.Module) -> Mapping[str, Any]:
    return lora_layers(model.body, "default")


def _matrices(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return A of each layer; B must be zero."""
    found = {}
    for name, layer in _layers(model).items():
        a, b = lora_A_and_B(layer, "default")
        if b.any():
            raise ValueError(f"expected B of {name} to begin at zero, got other numbers")
        found[name] = a
    return found


def _texts(task: LikelihoodTask, part: str, known: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return the texts of a part: tokens as places in the known ones, labels, and lengths."""

    def padded(rows: Sequence[torch.Tensor], value: int) -> torch.Tensor:
        stacked = nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)
        return stacked.cpu().to(torch.int32)

    ids = [ids for ids, _ in task.tokens[part]]
    return {
        "tokens": padded([torch.searchsorted(known, each) for each in ids], 0),
        "labels": padded([example.label for example in task.parts[part]], -100),
        "lengths": torch.tensor([len(each) for each in ids]),
    }


def _order(plan: Plan, task: LikelihoodTask, settings: Settings) -> torch.Tensor:
    """Return the places of the texts of each step, shape (steps, seeds, batch size)."""
    places = {id(example): place for place, example in enumerate(task.parts["train"])}
    columns = []
    for seed in range(plan.seeds):
        numbered = [
            Example(example.hidden[:, :0], torch.tensor(places[id(example)]))
            for example in task.training(seed)
        ]
        rows = batches(numbered, settings.batch_size, plan.steps, seed + BATCHES)
        columns.append(torch.stack([row["labels"] for row in rows]))
    return torch.stack(columns, 1)


def headlines(plan: Plan) -> tuple[LikelihoodTask, Settings, Path]:
    """Return SmolLM2 on headlines, adapters in all blocks."""
    cache = cache_folder() / "likelihood"
    texts = corpus("headlines"), corpus("reviews")
    task = LikelihoodTask(*texts, sizes=SIZES["headlines"], adapted=30, cache=cache)
    return task, Settings(rank=8, steps=plan.steps, batch_size=16, learn_from=128), smollm2()


WORDS = ("a", "very", "good", "film", "plot", "it", "was", "bad", "dire", "indeed")


def toy(plan: Plan, scratch: Path) -> tuple[LikelihoodTask, Settings, Path]:
    """Return a random-weight Llama on toy texts."""
    folder = _tiny_model(scratch / "model")
    texts, sizes = (_toy("toy"), _toy("other")), (60, 20, 30)
    task = LikelihoodTask(*texts, sizes=sizes, adapted=2, folder=folder, dtype=torch.float32)
    return task, Settings(rank=2, steps=plan.steps, batch_size=8, learn_from=16), folder


def _toy(name: str) -> Corpus:
    """Return sentences of two to four words."""
    numbers = range(len(WORDS) ** 3)
    texts = (" ".join(WORDS[n // 10**k % 10] for k in range(2 + n % 3)) for n in numbers)
    return Corpus(name, tuple(("it was", text) for text in dict.fromkeys(texts)))


def _tiny_model(folder: Path) -> Path:
    """Write a random-weight Llama and a tokenizer of words, unless they are there."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if folder.is_dir():
        return folder
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=16, num_hidden_layers=2, **size)
    tokenizer = Tokenizer(
        models.WordLevel({w: n for n, w in enumerate(("[UNK]", *WORDS))}, unk_token="[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    LlamaForCausalLM(config).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", eos_token="[UNK]"
    ).save_pretrained(folder)
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?", default=FOLDER)
    folder = parser.parse_args().folder
    plan = Plan()
    paths = write(plan, *headlines(plan), folder)
    print(json.dumps({str(path): path.stat().st_size for path in paths}, indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
