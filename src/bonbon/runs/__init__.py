"""A run's folder and the work in it."""
