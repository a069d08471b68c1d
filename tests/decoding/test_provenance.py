"""Groups say whether they are independent draws; older ones name only their strategy."""

from __future__ import annotations

import pytest

from bonbon.decoding.catalogue import STRATEGIES, strategy_class
from bonbon.groups.provenance import check_independent
from bonbon.system.errors import BonbonError


@pytest.mark.parametrize("name", STRATEGIES)
def test_groups_without_the_fact_are_known_by_their_strategy(name: str) -> None:
    older = {"strategy": {"name": name}}
    if strategy_class(name).independent:
        check_independent(older, "train on")
    else:
        with pytest.raises(BonbonError, match=f"strategy {name}, which steers"):
            check_independent(older, "train on")


def test_the_fact_decides_where_it_is_stated() -> None:
    check_independent({"strategy": {"name": "smc"}, "independent": True}, "train on")
    with pytest.raises(BonbonError, match=r"strategy mine, which steers .* plan from groups"):
        check_independent({"strategy": {"name": "mine"}, "independent": False}, "plan from")


def test_draws_of_a_sampler_are_independent() -> None:
    check_independent({}, "train on")
    check_independent({"strategy": None}, "train on")
