"""Forward passes that leave a model as it was, and the rows to learn from."""
