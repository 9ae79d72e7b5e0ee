"""Learners: streaming algorithms behind one interface."""
