"""Whether a learned projection helps: methods, tasks, training, statistics."""
