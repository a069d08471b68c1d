"""Rewards: what completions are scored with."""
