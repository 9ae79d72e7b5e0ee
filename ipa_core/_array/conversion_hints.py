"""Hint at how to make an array of an object that holds rows."""

from __future__ import annotations

from typing import Any


def conversion_hint(value: Any) -> str | None:
    """Return how to convert an object that holds rows but is no array, None if unknown."""
    if hasattr(value, "nnz") and hasattr(value, "toarray"):
        return "pass dense rows of it, x[i : i + 1024].toarray(); learners take sparse rows"
    if hasattr(value, "nnz") and hasattr(value, "todense"):
        return "pass dense rows of a sparse array, x[i : i + 1024].todense()"
    if hasattr(value, "__dask_graph__"):
        return "pass a Dask array to fit_projector as the stream, or its value, x.compute()"
    if hasattr(value, "to_numpy"):
        return "pass its values, x.to_numpy()"
    return None
