"""Answers from a model that is loaded in this process."""
