"""Answers of transformers with an adapter as SGLang's own code reads, checks and multiplies it.

    python run_sglang.py WHEEL REQUEST ANSWERS

The modules of `RUN` are executed from SGLang's wheel. They need only names from the rest of
SGLang, which needs a GPU: those modules are empty here. No package of this repository is imported.
"""

import importlib.abc
import importlib.machinery
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import MagicMock

import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

RUN = ("lora.lora", "lora.lora_config", "lora.utils", "lora.torch_ops", "layers.utils.common")
#: SGLang's layers, and those of transformers of which they consist.
STACKS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}


class Empty(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import empty modules for the parts of SGLang that are not run."""

    def find_spec(self, name, path=None, target=None):
        run = [f"sglang.srt.{x}" for x in RUN]
        if not name.startswith("sglang") or any(f"{name}.".startswith(f"{x}.") for x in run):
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = MagicMock(__spec__=spec, __file__=None)
        module.__path__ = [f"{sys.argv[1]}/{spec.name.replace('.', '/')}"]
        return module

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, Empty())
from sglang.srt.layers.utils.common import get_layer_id  # noqa: E402

sys.modules["sglang.srt.layers.utils"].get_layer_id = get_layer_id
from sglang.srt.lora.lora import LoRAAdapter  # noqa: E402
from sglang.srt.lora.lora_config import LoRAConfig  # noqa: E402
from sglang.srt.lora.torch_ops import sgemm_lora_a_fwd, sgemm_lora_b_fwd  # noqa: E402
from sglang.srt.lora.utils import (  # noqa: E402
    get_normalized_target_modules,
    get_stacked_multiply,
    get_target_module_name,
)


def main(request: dict) -> dict:
    base = request["base"]
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    given = {"base": answers(model, request)}
    for name, folder in request["adapters"].items():
        handles = apply(model, read(folder, model.config))
        given[name] = answers(model, request)
        for handle in handles:
            handle.remove()
    return given


def read(folder: str, config) -> LoRAAdapter:
    """Return the adapter after SGLang's loading; every tensor must belong to a layer of its own."""
    settings = LoRAConfig(folder)
    adapter = LoRAAdapter("uid", settings, config, load_config=None, lora_backend=None)
    adapter.initialize_weights_from_tensors(load_file(f"{folder}/adapter_model.safetensors"))
    targets = get_normalized_target_modules(settings.target_modules)
    for layer in adapter.layers:
        for name, weight in layer.weights.items():
            target = get_target_module_name(name, targets)  # raises if there is none
            rows = settings.r * get_stacked_multiply(target)
            assert "lora_A" not in name or len(weight) == rows, (name, weight.shape)
    return adapter


def apply(model: torch.nn.Module, adapter: LoRAAdapter) -> list:
    """Add the adapter's part to the outputs of the layers, by SGLang's reference operations."""
    handles = []
    for layer in adapter.layers:
        for name, a in layer.weights.items():
            if "lora_A" not in name:
                continue
            b = layer.weights[name.replace("lora_A", "lora_B")]
            path = name.removeprefix("base_model.model.").partition(".lora_A")[0]
            parent, _, leaf = path.rpartition(".")
            parts = [model.get_submodule(f"{parent}.{x}") for x in STACKS.get(leaf, (leaf,))]
            offsets = torch.tensor([0, *(x.out_features for x in parts)]).cumsum(0)
            for number, part in enumerate(parts):
                hook = partial(_add, a=a, b=b, offsets=offsets, number=number, adapter=adapter)
                handles.append(part.register_forward_hook(hook))
    return handles


def _add(module, arguments, output, *, a, b, offsets, number, adapter):
    x = arguments[0].flatten(0, -2)
    batch = SimpleNamespace(
        use_cuda_graph=False,
        weight_indices_cpu=torch.tensor([0]),
        seg_lens_cpu=torch.tensor([len(x)]),
        lora_ranks_cpu=torch.tensor([adapter.config.r]),
        scalings_cpu=torch.tensor([adapter.scaling]),
    )
    hidden = sgemm_lora_a_fwd(x, a[None], batch, num_slices=len(offsets) - 1)
    added = sgemm_lora_b_fwd(hidden, b[None], batch, offsets)
    return output + added[:, offsets[number] : offsets[number + 1]].view_as(output)


@torch.no_grad()
def answers(model: torch.nn.Module, request: dict) -> list[dict]:
    given = []
    for prompt in request["prompts"]:
        ids = torch.tensor([prompt])
        logits = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
        tokens = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=request["new_tokens"],
            min_new_tokens=request["new_tokens"],
            do_sample=False,
        )
        given.append(
            {
                "logprobs": logits.gather(1, ids[0, 1:, None])[:, 0].tolist(),
                "tokens": tokens[0, len(prompt) :].tolist(),
            }
        )
    return given


if __name__ == "__main__":
    answered = main(json.loads(Path(sys.argv[2]).read_text()))
    Path(sys.argv[3]).write_text(json.dumps(answered))
