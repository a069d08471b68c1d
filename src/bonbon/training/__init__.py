"""Training a policy on groups: the trainer, its batches, and its data set."""
