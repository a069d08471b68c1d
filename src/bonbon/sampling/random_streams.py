"""Random streams keyed by completion, so that draws do not depend on the batch.

Completion k of a prompt has a counter-based stream (Philox) keyed by a hash of (seed, stream,
prompt id, k), so no draw depends on other draws, their order or the batch size.

Engines with random generators of their own take one seed a prompt: vLLM's completion k has the seed
s + k. `request_seed` hashes s from the same names into 63 bits. Among N prompts with n completions
any two share a seed with a probability of N²·n / 2^63: 10^-6 for a million prompts and n = 8. CUDA
generators use all 64 bits of a seed; torch's CPU generator uses only the low 32, so a million
prompts certainly share some. Completions of one prompt never share a seed. If completions of two
*different* prompts share one, they use the same noise, but each still has its correct distribution.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_SEEDS = 2**63 - 2**32  # room for the numbers of a prompt's completions below 2^63


def uniform_stream(
    seed: int, stream: str, prompt_id: str, k: int, count: int
) -> NDArray[np.float64]:
    """Return the first `count` uniform numbers of completion k's stream, float64 in [0, 1)."""
    name = f"{seed}\0{stream}\0{prompt_id}\0{k}".encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "big")
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def request_seed(seed: int, stream: str, prompt_id: str) -> int:
    """Return the seed of a prompt's completion 0, in [0, 2^63 − 2^32); completion k adds k."""
    name = f"{seed}\0{stream}\0{prompt_id}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "big") % _SEEDS
