"""Training with unsloth, in its environment: python run_unsloth.py ADAPTER OUT."""

import sys

from unsloth import FastLanguageModel  # isort: skip
from datasets import Dataset
from outcome import equal, lora
from trl import SFTConfig, SFTTrainer

import ipa_hf

adapter, out = sys.argv[1:]
model, tokenizer = FastLanguageModel.from_pretrained(adapter, load_in_4bit=False)
ipa_hf.freeze_projections(model)
a = lora(model, "A")
trainer = SFTTrainer(
    model=model,
    args=SFTConfig(
        out, max_steps=4, per_device_train_batch_size=2, learning_rate=1e-2, report_to=[]
    ),
    train_dataset=Dataset.from_list([{"text": "a b c d e f"}, {"text": "f a m b c l d"}] * 4),
    processing_class=tokenizer,
)
trainer.train()
assert all(equal(lora(model, "A"), a))
model.save_pretrained(out)
