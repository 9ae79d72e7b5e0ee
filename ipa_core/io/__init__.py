"""Activation streams and files."""
