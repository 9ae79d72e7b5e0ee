"""Learning projectors from the gradients of weights."""
