"""Readers of file formats that hold rows of activations, a file for each format."""
