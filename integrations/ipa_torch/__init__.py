"""Projections learned from the activations of any torch model, placed into its layers."""
