"""Time of `export_lora` beside PEFT's `save_pretrained`.

    python -m benchmarks.export [--quick]

LoRA of rank 32 on all 210 linear layers of SmolLM2-135M's blocks, started from projections; two
threads, interleaved. `ipa_hf.export_lora` folds scalings and pads ranks; `save_pretrained` writes
the weights unchanged. The floor is one plain write of the adapter's numbers to the same folder.
"""

import argparse
import shutil
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel
from safetensors.torch import load_file

import ipa_hf
from benchmarks import assets, record
from benchmarks.timing import interleaved, medians, ratio
from benchmarks.torch_learning import PACKAGES, THREADS, blocks
from ipa_torch import select_layers

RANK = 32
ADAPTER = "adapter_model.safetensors"


def adapted() -> PeftModel:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(assets.smollm2())
    names = [f"model.{name}" for name in select_layers(model.model, blocks)]
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=names, task_type="CAUSAL_LM")
    ids = torch.randint(model.config.vocab_size, (2, 64))
    return ipa_hf.get_ipa_model(model, config, [{"input_ids": ids}], progress=False)


def numbers(model: PeftModel) -> bytes:
    """Return the bytes of all A and B."""
    parts = (p for name, p in model.named_parameters() if "lora_" in name)
    return b"".join(part.detach().numpy().tobytes() for part in parts)


def measure(model: PeftModel, folder: Path, repeats: int) -> dict[str, Any]:
    content, plain = numbers(model), folder / "plain"
    times = interleaved(
        {
            "ours": lambda: ipa_hf.export_lora(model, folder / "ours"),
            "PEFT": lambda: model.save_pretrained(str(folder / "peft")),
            "plain write": lambda: plain.write_bytes(content),
        },
        repeats,
    )
    written = {
        "ours": (folder / "ours" / ADAPTER).stat().st_size,
        "PEFT": (folder / "peft" / ADAPTER).stat().st_size,
        "plain write": len(content),
    }
    ours, theirs = (load_file(folder / name / ADAPTER) for name in ("ours", "peft"))
    return {
        "seconds": medians(times),
        "bytes": written,
        "time_ratio": ratio(times, "ours", "PEFT"),
        "size_ratio": written["ours"] / written["PEFT"],
        "floors": {
            "time": ratio(times, "plain write", "PEFT"),
            "size": written["plain write"] / written["PEFT"],
        },
        "same_tensors": ours.keys() == theirs.keys()
        and all(torch.equal(ours[name], theirs[name]) for name in ours),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="3 turns instead of 15")
    quick = parser.parse_args().quick
    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # a model of this path has no card
    folder = Path(tempfile.mkdtemp())
    try:
        results = measure(adapted(), folder, 3 if quick else 15)
    finally:
        shutil.rmtree(folder)
    print(results)
    record.write("export", quick, PACKAGES, {"threads": THREADS} | results)


if __name__ == "__main__":
    main()
