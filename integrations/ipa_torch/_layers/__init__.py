"""Layers of a model: selection, sizes, and the view as a matrix product."""
