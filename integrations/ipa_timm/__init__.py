"""What is particular to timm models."""
