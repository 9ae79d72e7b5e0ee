"""llama.cpp serves exported adapters: its converters, its library, and a server over HTTP."""

import json
import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from contextlib import contextmanager

import pytest
from transformers import AutoTokenizer

from .conftest import QUIET, execute
from .served_models import NEW_TOKENS, TEXTS, difference

# The cache of keys and values is in float16 unless a server is told otherwise.
MOST = {"f32": 0.03, "f16": 0.05}


@pytest.fixture(scope="module")
def convert(llama_cpp, served, tmp_path_factory):
    """Return a function that converts with llama.cpp's scripts: the base model, or an adapter."""
    folder = tmp_path_factory.mktemp("gguf")

    def run(source, numbers):
        out = folder / f"{source.name}-{numbers}.gguf"
        script, options = "convert_hf_to_gguf.py", []
        if source != served.base:
            script, options = "convert_lora_to_gguf.py", ["--base", served.base]
        script = llama_cpp / "source" / script
        options += ["--outtype", numbers, "--outfile", out]
        if not out.exists():
            status, said = execute([llama_cpp / "bin" / "python", script, source, *options])
            assert status == 0, said
        return str(out)

    return run


@pytest.fixture(scope="module", params=["f32", "f16"])
def numbers(request):
    return request.param


@pytest.fixture(scope="module")
def answers(llama_cpp, served, answer, convert, numbers):
    """Return the answers, those with PEFT's folder of ranks that differ among them."""
    folders = served.adapters
    if numbers == "f32":
        folders = folders | {"peft-ranks": served.peft_folders["ranks"]}
    request = served.request() | {
        "base": convert(served.base, numbers),
        "adapters": {name: convert(folder, numbers) for name, folder in folders.items()},
    }
    return answer(llama_cpp / "bin" / "python", "run_llama_cpp.py", request)


@pytest.mark.parametrize("name", ["base", "plain", "ranks"])
def test_answers_are_those_of_transformers(name, served, answers, numbers, results):
    results.compare(f"llama.cpp, {numbers}", name, answers, served, MOST[numbers])


def test_ranks_that_differ_need_the_export(served, answers, results):
    """llama.cpp divides one alpha by each tensor's rank, whatever PEFT's patterns say."""
    if "peft-ranks" not in answers:
        pytest.skip("once is enough")
    distance = difference(answers["peft-ranks"], served.expected["ranks"])
    row = ["llama.cpp, f32", "ranks, as PEFT saved it", answers["version"], f"{distance:.1e}"]
    results.add(*row, "differs")
    assert distance > 0.5


@contextmanager
def serve(python, models, folder):
    """Run llama-cpp-python's server on a free port of the loopback; yield its address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {"host": "127.0.0.1", "port": port, "models": models}
    (folder / "server.json").write_text(json.dumps(settings))
    command = [python, "-m", "llama_cpp.server", "--config_file", folder / "server.json"]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(command, env=os.environ | QUIET, stdout=log, stderr=log)
        try:
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()
            process.wait(timeout=60)


def ask(address, content=None, patience=120):
    """Return the server's answer; it is asked again while it starts."""
    data = None if content is None else json.dumps(content).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json"})
    ends = time.monotonic() + patience
    while True:
        try:
            with urllib.request.urlopen(request, timeout=patience) as reply:
                return json.load(reply)
        except urllib.error.URLError:
            if time.monotonic() > ends:
                raise
            time.sleep(0.5)


def test_the_server_answers_with_and_without_adapters(
    llama_cpp, served, convert, results, tmp_path
):
    base = {"model": convert(served.base, "f32"), "n_ctx": 256}
    models = [base | {"model_alias": "base"}]
    for name, folder in served.adapters.items():
        models.append(base | {"model_alias": name, "lora_path": convert(folder, "f32")})
    tokenizer = AutoTokenizer.from_pretrained(served.base)
    with serve(llama_cpp / "bin" / "python", models, tmp_path) as address:
        assert {x["id"] for x in ask(f"{address}/models")["data"]} == {"base", *served.adapters}
        for name in ["base", *served.adapters]:
            # The server penalizes repetition unless it is told not to.
            options = {
                "model": name,
                "max_tokens": NEW_TOKENS,
                "temperature": 0,
                "repeat_penalty": 1,
            }
            for text, expected in zip(TEXTS, served.expected[name], strict=True):
                reply = ask(f"{address}/completions", options | {"prompt": text})
                assert reply["choices"][0]["text"] == tokenizer.decode(expected["tokens"])
            results.add("llama-cpp-python over HTTP", name, "0.3.36", "not asked", "equal")
