"""Learning projectors from the inputs of layers."""
