"""Plans made before anything costly runs: which n to use, and how to share a cluster."""
