"""Answers from another server's completions: draw there, choose here."""
