"""Comparison of initializations of A: methods, tasks, training, statistics."""
