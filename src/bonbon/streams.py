"""Random numbers that belong to a completion and not to a batch.

Completion k of a prompt owns a counter-based stream (Philox) keyed by a hash of (seed, stream,
prompt id, k), so that no draw depends on what else is drawn, in which order or how much at once.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray


def uniform_stream(
    seed: int, stream: str, prompt_id: str, k: int, count: int
) -> NDArray[np.float64]:
    """The first `count` uniform numbers of completion k's random stream, float64 in [0, 1)."""
    name = f"{seed}\0{stream}\0{prompt_id}\0{k}".encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "big")
    return np.random.Generator(np.random.Philox(key=key)).random(count)
