"""Best-of-n: the candidate of the largest reward."""

from __future__ import annotations

import numpy as np

from bonbon.decoding.strategy import Floats, Source, WholeDraws, one_hot
from bonbon.groups.group import Group


class BestOfN(WholeDraws):
    """Draw n, keep the best; of tied candidates the first drawn.

    The tilt f(u) = n u^(n−1), `bonbon.tilt.BestOfN`: draws are exchangeable, so taking the first of
    tied ones shares their probability as drawing among them would.
    """

    def weights(self, group: Group, source: Source) -> Floats:
        """See `WholeDraws.weights`."""
        assert group.rewards is not None
        return one_hot(int(np.argmax(group.rewards)), group.n)
