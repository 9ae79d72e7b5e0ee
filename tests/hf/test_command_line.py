import json
import os
import subprocess
import sys

import pytest
import transformers
from peft import PeftModel
from tokenizers import processors

from ipa_hf import __main__
from ipa_hf.__main__ import main
from ipa_hf.adapter_metadata import AdapterMetadata, LayerMetadata
from ipa_hf.calibration_data import CalibrationData
from tests.tiny_model import letter_tokenizer

from .models import make, outputs, text_batches


@pytest.fixture
def model(tmp_path):
    """Return a folder with a tiny Llama and a word tokenizer."""
    folder = tmp_path / "model"
    make("llama").save_pretrained(folder)
    template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    letter_tokenizer(chat_template=template).save_pretrained(folder)
    return folder


@pytest.fixture
def texts(tmp_path):
    path = tmp_path / "texts.txt"
    path.write_text("a b c d\n\ne f g h i j\nk l m\nb d f h\n")
    return path


def fit(model, data, out, *options):
    arguments = ["fit", model, data, "--out", out, "--rank", "2", *options]
    return main([str(argument) for argument in arguments])


def test_a_trainer_can_start_from_it(model, texts, tmp_path, capsys):
    out = tmp_path / "adapter"
    assert fit(model, texts, out, "--targets", "q_proj,v_proj") == 0
    assert "P, frozen" in capsys.readouterr().out
    batch = text_batches()[0]
    adapter = PeftModel.from_pretrained(make("llama"), out, is_trainable=True)
    expected = outputs(make("llama"), batch)
    assert (outputs(adapter, batch) - expected).abs().max() < 1e-6
    settings = json.loads((out / "adapter_config.json").read_text())
    assert settings["task_type"] == "CAUSAL_LM"
    assert sorted(settings["target_modules"]) == ["q_proj", "v_proj"]


def test_first_tokens_are_left_out(model, texts, tmp_path, capsys):
    fit(model, texts, tmp_path / "all")
    assert "rows by attention_mask.\nWith A frozen, start at ten times" in capsys.readouterr().out
    fit(model, texts, tmp_path / "rest", "--without-first-token", "--trainable")
    shown = capsys.readouterr().out
    assert "rows by without_first_token." in shown and "With A frozen" not in shown
    counts = {
        out: {x.samples for x in AdapterMetadata.read(tmp_path / out).layers.values()}
        for out in ("all", "rest")
    }
    assert counts == {"all": {17}, "rest": {17 - 4}}


@pytest.mark.parametrize(
    "rows", [[{"text": "a b c"}], [{"messages": [{"role": "user", "content": "a b c d"}]}]]
)
def test_json_lines(model, tmp_path, rows):
    data = tmp_path / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows * 3))
    assert fit(model, data, tmp_path / "adapter") == 0


def test_a_rendered_chat_has_its_special_tokens_once(model, tmp_path):
    # The tokenizer and the template both write BOS, as in Llama 3.
    tokenizer = transformers.AutoTokenizer.from_pretrained(model)
    tokenizer.bos_token = "<s>"
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    tokenizer.chat_template = "{{ bos_token }}" + tokenizer.chat_template
    tokenizer.save_pretrained(model)
    data = tmp_path / "rows.jsonl"
    rows = [
        {"text": "a b"},
        {"messages": [{"role": "user", "content": "a b c d"}]},
        {"text": "a b c d e f g h"},
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    samples = CalibrationData(data, str(model), count=3, batch_size=3, max_length=8)
    (batch,) = samples
    begin = tokenizer.bos_token_id
    assert (batch["input_ids"][:, 0] == begin).all()
    # pad_token is the same token here: only real positions count.
    counts = ((batch["input_ids"] == begin) & batch["attention_mask"].bool()).sum(1)
    assert counts.tolist() == [1, 1, 1]
    assert batch["attention_mask"].sum(1).tolist() == [3, 5, 8]  # the last one is truncated
    expected = tokenizer.apply_chat_template(rows[1]["messages"], tokenize=True, return_dict=False)
    assert batch["input_ids"][1, :5].tolist() == expected


def test_images(tmp_path):
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for shade in range(4):
        Image.new("RGB", (20, 20), (shade * 60, 9, 200 - shade)).save(folder / f"{shade}.png")
    sizes = {"image_size": 16, "patch_size": 4, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.ViTConfig(hidden_size=16, intermediate_size=16, **sizes)
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    (tmp_path / "vit" / "preprocessor_config.json").write_text(
        json.dumps(
            {"image_processor_type": "ViTImageProcessor", "size": {"height": 16, "width": 16}}
        )
    )
    assert fit(tmp_path / "vit", folder, tmp_path / "adapter") == 0


def test_same_seed_same_adapter(model, texts, tmp_path):
    for name in ("first", "second"):
        fit(model, texts, tmp_path / name, "--samples", "2", "--seed", "3")
    first, second = (tmp_path / x / "adapter_model.safetensors" for x in ("first", "second"))
    assert first.read_bytes() == second.read_bytes()


def test_show(model, texts, tmp_path, capsys):
    out = tmp_path / "adapter"
    fit(model, texts, out, "--trainable", "--scaling", "0.25")
    capsys.readouterr()
    assert main(["show", str(out), "--plot", str(tmp_path / "energy.png")]) == 0
    shown = capsys.readouterr().out
    assert "model.layers.1.mlp.down_proj" in shown
    assert "trained with B; scaling 0.25" in shown
    assert (tmp_path / "energy.png").read_bytes().startswith(b"\x89PNG")


def test_layers_are_shown_in_the_order_of_the_model(tmp_path, capsys):
    layer = LayerMetadata(rank=2, scale=1.0, captured=0.5, samples=9)
    names = ["layers.2.q_proj", "layers.10.q_proj"]
    AdapterMetadata(True, "energy", dict.fromkeys(names, layer)).write(tmp_path)
    assert main(["show", str(tmp_path)]) == 0
    shown = capsys.readouterr().out
    assert shown.index(names[0]) < shown.index(names[1])


def test_version(capsys):
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("ipa-projectors ")


def test_interruption_names_the_cure(model, texts, tmp_path, monkeypatch, capsys):
    def interrupt(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(__main__, "get_ipa_model", interrupt)
    assert fit(model, texts, tmp_path / "adapter") == 130
    assert capsys.readouterr().err.endswith("run the same command again to resume\n")


@pytest.mark.parametrize(
    ("line", "message"), [("{", "line 1"), ('{"body": 1}', "'text' or 'messages'"), ("[]", "line")]
)
def test_bad_lines_are_named(model, tmp_path, capsys, line, message):
    data = tmp_path / "rows.jsonl"
    data.write_text(line + "\n")
    assert fit(model, data, tmp_path / "adapter") == 1
    assert message in capsys.readouterr().err


def test_pickled_weights_are_refused_unless_asked_for(model, texts, tmp_path, capsys):
    import torch

    (model / "model.safetensors").unlink()
    torch.save(make("llama").state_dict(), model / "pytorch_model.bin")
    assert fit(model, texts, tmp_path / "adapter") == 1
    assert "safetensors" in capsys.readouterr().err
    assert fit(model, texts, tmp_path / "adapter", "--allow-pickle") == 0


def test_remote_code_is_refused_unless_asked_for(model, texts, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", tmp_path / "modules")
    (model / "code.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OddConfig(LlamaConfig):\n    model_type = 'odd'\n"
        "class OddForCausalLM(LlamaForCausalLM):\n    config_class = OddConfig\n"
    )
    settings = json.loads((model / "config.json").read_text())
    settings |= {
        "model_type": "odd",
        "architectures": ["OddForCausalLM"],
        "auto_map": {
            "AutoConfig": "code.OddConfig",
            "AutoModelForCausalLM": "code.OddForCausalLM",
        },
    }
    (model / "config.json").write_text(json.dumps(settings))
    assert fit(model, texts, tmp_path / "adapter") == 1
    assert "trust_remote_code" in capsys.readouterr().err
    assert fit(model, texts, tmp_path / "adapter", "--trust-remote-code") == 0


def test_nothing_to_learn_from(model, tmp_path, capsys):
    (tmp_path / "images").mkdir()
    assert fit(model, tmp_path / "images", tmp_path / "adapter") == 1
    assert fit(model, tmp_path / "nowhere.txt", tmp_path / "adapter") == 1
    assert main(["show", str(tmp_path)]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 3


def test_output_on_a_full_disk(model, texts, tmp_path):
    fit(model, texts, tmp_path / "adapter")
    command = f"{sys.executable} -m ipa_hf show adapter > /dev/full"
    environment = os.environ | {"PYTHONUNBUFFERED": ""}
    options = {"shell": True, "cwd": tmp_path, "env": environment}
    done = subprocess.run(command, **options, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "ipa_hf: [Errno 28] No space left on device\n")


def test_as_a_module():
    done = subprocess.run([sys.executable, "-m", "ipa_hf", "fit", "--help"], capture_output=True)
    assert done.returncode == 0 and b"--targets" in done.stdout


KILLED = """
import os, signal, sys
from transformers import LlamaForCausalLM
from ipa_hf import __main__ as command

command.CHECKPOINT_SECONDS = 1e-9  # write after each batch
forward, runs = LlamaForCausalLM.forward, []

def counted(self, *args, **kwargs):
    runs.append(1)
    if len(runs) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return forward(self, *args, **kwargs)

LlamaForCausalLM.forward = counted
command.main(sys.argv[1:])
"""


# Number of batches run after resuming. Without a memory limit, two of five batches were recorded
# before the kill. With it, the first batch had measured memory, and one of five was recorded in the
# first of two passes.
@pytest.mark.parametrize(
    ("options", "remaining"),
    [
        ([], 5 - 2),
        (["--max-bytes", "100000", "--targets", "q_proj,up_proj,down_proj"], 1 + (5 - 1) + 5),
    ],
)
def test_resumes_after_a_kill(model, tmp_path, monkeypatch, options, remaining):
    data, out = tmp_path / "texts.txt", tmp_path / "adapter"
    data.write_text("a b c d e\n" * 3 + "f g h i j\n" * 3 + "k l m a b\n" * 4)
    options = ["--rank", "2", "--batch-size", "2", *options]
    assert fit(model, data, tmp_path / "whole", *options) == 0
    command = [sys.executable, "-c", KILLED, "fit", model, data, "--out", out, *options]
    assert subprocess.run(list(map(str, command)), capture_output=True).returncode == -9
    assert (tmp_path / "adapter.learning").is_dir() and not out.exists()

    forward, runs = transformers.LlamaForCausalLM.forward, []
    monkeypatch.setattr(
        transformers.LlamaForCausalLM,
        "forward",
        lambda self, *args, **kwargs: runs.append(1) or forward(self, *args, **kwargs),
    )
    assert fit(model, data, out, *options) == 0
    assert len(runs) == remaining
    assert not (tmp_path / "adapter.learning").exists()
    whole, resumed = (tmp_path / x / "adapter_model.safetensors" for x in ("whole", "adapter"))
    assert whole.read_bytes() == resumed.read_bytes()


def test_resumes_with_the_same_command_only(model, texts, tmp_path, monkeypatch, capsys):
    def stop(self, directory):
        raise OSError("no space left")

    with monkeypatch.context() as patch:
        patch.setattr(PeftModel, "save_pretrained", stop)
        assert fit(model, texts, tmp_path / "adapter") == 1
    assert fit(model, texts, tmp_path / "adapter", "--rank", "3") == 1
    assert "start over" in capsys.readouterr().err
    assert fit(model, texts, tmp_path / "adapter") == 0
