"""Random numbers that belong to a completion and not to a batch.

Completion k of a prompt owns a counter-based stream (Philox) keyed by a hash of (seed, stream,
prompt id, k), so that no draw depends on what else is drawn, in which order or how much at once.

Engines that draw by themselves take a seed for each prompt instead and count its completions from
there: vLLM's completion k has the seed s + k. `request_seed` hashes s from the same names into 63
bits. Of N prompts with n completions any two share a seed with a probability of N²·n / 2^63: 10^-6
for a million prompts and n = 8. CUDA generators use all 64 bits of a seed; torch's CPU generator
uses the low 32 alone, and there a million prompts are sure to share some. Completions of one prompt
never share one. A shared seed means that completions of two *different* prompts are drawn by the
same noise; each still comes from its own right distribution.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

_SEEDS = 2**63 - 2**32  # room for the numbers of a prompt's completions below 2^63


def uniform_stream(
    seed: int, stream: str, prompt_id: str, k: int, count: int
) -> NDArray[np.float64]:
    """The first `count` uniform numbers of completion k's random stream, float64 in [0, 1)."""
    name = f"{seed}\0{stream}\0{prompt_id}\0{k}".encode()
    key = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "big")
    return np.random.Generator(np.random.Philox(key=key)).random(count)


def request_seed(seed: int, stream: str, prompt_id: str) -> int:
    """The seed of a prompt's completion 0, in [0, 2^63 − 2^32); completion k has this one + k."""
    name = f"{seed}\0{stream}\0{prompt_id}".encode()
    return int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "big") % _SEEDS
