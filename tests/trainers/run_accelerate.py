"""Training with accelerate: torchrun --nproc-per-node 2 run_accelerate.py MODEL ADAPTER OUT."""

import sys

import torch
from accelerate import Accelerator
from outcome import equal, lora
from transformers import AutoModelForCausalLM

import ipa_hf

base, adapter, out = sys.argv[1:]
accelerator = Accelerator(cpu=True)
assert accelerator.num_processes == 2
model = AutoModelForCausalLM.from_pretrained(base)
model = ipa_hf.load_adapter(model, adapter, is_trainable=True)
a = lora(model, "A")
optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
rows = torch.randint(2, 15, (16, 6), generator=torch.Generator().manual_seed(0))
model, optimizer, loader = accelerator.prepare(
    model, optimizer, torch.utils.data.DataLoader(rows, batch_size=2)
)
for ids in loader:
    accelerator.backward(model(input_ids=ids, labels=ids).loss)
    optimizer.step()
    optimizer.zero_grad()
trained = accelerator.unwrap_model(model)
assert all(equal(lora(trained, "A"), a))
for b in lora(trained, "B").values():
    first, second = accelerator.gather(b[None])
    assert torch.equal(first, second)
if accelerator.is_main_process:
    trained.save_pretrained(out)
