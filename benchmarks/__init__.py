"""Measurements on real models and real data; no part of the installed packages."""
