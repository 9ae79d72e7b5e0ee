"""What is particular to transformers and PEFT."""
