"""Forward passes in evaluation mode, and the activation rows and weights in them."""
