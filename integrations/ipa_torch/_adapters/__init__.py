"""Low-rank adapters beside the layers of a model."""
