"""Answers of llama.cpp, both adapters loaded in one process, without packages of this repository.

python run_llama_cpp.py REQUEST ANSWERS
"""

import ctypes
import json
import sys
from pathlib import Path

import llama_cpp
import numpy as np


def main(request: dict) -> dict:
    llama = llama_cpp.Llama(request["base"], n_ctx=256, logits_all=True, verbose=False)
    loaded = {
        name: llama_cpp.llama_adapter_lora_init(llama.model, path.encode())
        for name, path in request["adapters"].items()
    }
    assert all(loaded.values()), loaded
    given = {"version": llama_cpp.__version__}
    for name in ["base", *loaded, "base"]:  # adapters leave nothing behind
        use(llama, [loaded[name]] if name != "base" else [])
        answered = [answer(llama, ids, request["new_tokens"]) for ids in request["prompts"]]
        assert given.setdefault(name, answered) == answered
    return given


def use(llama: llama_cpp.Llama, adapters: list) -> None:
    array = (llama_cpp.llama_adapter_lora_p_ctypes * len(adapters))(*adapters)
    scales = (ctypes.c_float * len(adapters))(*[1.0] * len(adapters))
    assert not llama_cpp.llama_set_adapters_lora(llama.ctx, array, len(adapters), scales)


def answer(llama: llama_cpp.Llama, ids: list[int], count: int) -> dict:
    llama.reset()
    llama.eval(ids)
    logits = np.asarray(llama.scores[: len(ids)], dtype=np.float64)
    top = logits.max(-1, keepdims=True)
    scores = logits - top - np.log(np.exp(logits - top).sum(-1, keepdims=True))
    tokens = []
    for _ in range(count):
        tokens.append(int(llama.scores[llama.n_tokens - 1].argmax()))
        llama.eval(tokens[-1:])
    return {"logprobs": scores[np.arange(len(ids) - 1), ids[1:]].tolist(), "tokens": tokens}


if __name__ == "__main__":
    answered = main(json.loads(Path(sys.argv[1]).read_text()))
    Path(sys.argv[2]).write_text(json.dumps(answered))
