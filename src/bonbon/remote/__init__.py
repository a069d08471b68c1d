"""Other people's servers: drawing from them, scoring by them, and asking them at all."""
