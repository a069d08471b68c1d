"""Best-of-n: the candidate with the largest reward."""

from __future__ import annotations

import numpy as np

from bonbon.decoding.strategy import Floats, Source, WholeDraws, one_hot
from bonbon.groups.group import Group


class BestOfN(WholeDraws):
    """Draw n and keep the best; of tied candidates the first drawn.

    The tilt f(u) = n u^(n−1), `bonbon.tilt.BestOfN`. Draws are exchangeable, so the first of tied
    ones has the same distribution as a random one of them.
    """

    def weights(self, group: Group, source: Source) -> Floats:
        """See `WholeDraws.weights`."""
        assert group.rewards is not None
        return one_hot(int(np.argmax(group.rewards)), group.n)
