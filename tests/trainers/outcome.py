"""Claims about adapters after training: A as it was, B trained, loaded by stock PEFT."""

from pathlib import Path

import torch
from peft import PeftModel
from safetensors.torch import load_file

WEIGHTS = "adapter_model.safetensors"


def lora(model: torch.nn.Module, part: str) -> dict[str, torch.Tensor]:
    """Return copies of all A or all B of the default adapter."""
    named = model.named_parameters()
    return {n: p.detach().clone() for n, p in named if f"lora_{part}.default" in n}


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> list[bool]:
    """Return for each tensor whether it is equal to the bit."""
    assert one.keys() == other.keys() and one
    return [torch.equal(tensor, other[name]) for name, tensor in one.items()]


def check_trained(before: Path, after: Path, frozen: bool = True) -> None:
    """Check that every B has changed, and that no A has, or that every A has."""
    old, new = load_file(before / WEIGHTS), load_file(after / WEIGHTS)
    a, b = ({n: t for n, t in old.items() if part in n} for part in ("lora_A", "lora_B"))
    assert not any(equal(b, {name: new[name] for name in b}))
    unchanged = equal(a, {name: new[name] for name in a})
    assert all(unchanged) if frozen else not any(unchanged)


@torch.no_grad()
def check_loads(base: torch.nn.Module, folder: Path, trained: torch.nn.Module | None) -> None:
    """Check that stock PEFT computes from the folder what the trained model computes."""
    batch = {"input_ids": torch.tensor([[2, 3, 4, 5, 6]])}
    plain = base.eval()(**batch)[0]
    loaded = PeftModel.from_pretrained(base, folder).eval()
    outputs = loaded(**batch)[0]
    assert not torch.equal(outputs, plain)
    if trained is not None:
        expected = trained.eval()(**batch)[0]
        torch.testing.assert_close(outputs, expected.to(outputs), atol=1e-5, rtol=1e-5)
