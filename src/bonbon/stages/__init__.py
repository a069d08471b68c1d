"""Stages of a run, one module each: one folder in, one folder out."""
