"""Answers of vLLM on a CPU; runs in vLLM's environment, without the packages of this repository.

python run_vllm.py REQUEST ANSWERS
"""

import json
import os
import sys
from importlib.metadata import version
from pathlib import Path

# The engine in this process: one copy of the model.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ["VLLM_CPU_KVCACHE_SPACE"] = "1"

from vllm import LLM, SamplingParams  # noqa: E402
from vllm.lora.request import LoRARequest  # noqa: E402


def main(request: dict) -> dict:
    ranks = [
        json.loads(Path(x, "adapter_config.json").read_text())["r"]
        for x in request["adapters"].values()
    ]
    # vLLM takes these ranks only.
    rank = next(r for r in (1, 8, 16, 32, 64) if r >= max(ranks))
    engine = LLM(
        request["base"],
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=16,
        enable_lora=True,
        max_loras=len(ranks),
        max_lora_rank=rank,
    )
    adapters = {
        name: LoRARequest(name, number, folder)
        for number, (name, folder) in enumerate(request["adapters"].items(), 1)
    }
    given = {
        name: answers(engine, adapter, request)
        for name, adapter in {"base": None, **adapters}.items()
    }
    return given | {"version": version("vllm-cpu")}


def answers(engine: LLM, adapter: LoRARequest | None, request: dict) -> list[dict]:
    count = request["new_tokens"]
    greedy = SamplingParams(temperature=0, max_tokens=count, ignore_eos=True)
    prompts = [{"prompt_token_ids": ids} for ids in request["prompts"]]
    outputs = engine.generate(prompts, greedy, lora_request=adapter, use_tqdm=False)
    return [
        {
            "logprobs": log_probabilities(engine, adapter, ids),
            "tokens": list(output.outputs[0].token_ids),
        }
        for ids, output in zip(request["prompts"], outputs, strict=True)
    ]


def log_probabilities(engine: LLM, adapter: LoRARequest | None, ids: list[int]) -> list[float]:
    """Return those of the tokens after the first, each as the only allowed next token.

    They are those before the restriction. With LoRA, ``prompt_logprobs`` fails on a CPU.
    """
    prefixes = [{"prompt_token_ids": ids[:length]} for length in range(1, len(ids))]
    forced = [
        SamplingParams(max_tokens=1, logprobs=0, allowed_token_ids=[token]) for token in ids[1:]
    ]
    outputs = engine.generate(prefixes, forced, lora_request=adapter, use_tqdm=False)
    return [
        output.outputs[0].logprobs[0][token].logprob
        for token, output in zip(ids[1:], outputs, strict=True)
    ]


if __name__ == "__main__":
    answered = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(answered))
