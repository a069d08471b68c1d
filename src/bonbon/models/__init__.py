"""Language models: loading, forward passes, log-probabilities."""
