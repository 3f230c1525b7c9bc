"""What clients can afford, and who takes part."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora.config import FleetConfig
from fslora.fleet import build_fleet, sample_cohort, with_spares
from fslora.rng import Rng


def ranks(config: FleetConfig, rank: int = 32, seed: int = 0) -> list[int]:
    fleet = build_fleet(config, rank, range(config.clients), Rng(seed))
    assert [client.id for client in fleet] == [client.examples for client in fleet] == list(range(config.clients))
    return [client.rank for client in fleet]


def test_listed_ranks_are_taken_as_they_are():
    assert ranks(FleetConfig(clients=3, cohort="all", ranks=(4, 1, 32))) == [4, 1, 32]


def test_ratios_are_dealt_in_equal_shares_and_shuffled():
    config = FleetConfig(clients=20, ratios=(0.01, 0.125, 0.5, 1.0))
    drawn = ranks(config, rank=64)
    assert Counter(drawn) == {1: 5, 8: 5, 32: 5, 64: 5}
    assert drawn == ranks(config, rank=64) != ranks(config, rank=64, seed=1)
    assert drawn != sorted(drawn)


@settings(deadline=None)
@given(
    st.sampled_from(["uniform", "normal", "heavy-tail-low"]),
    st.integers(1, 20),
    st.integers(0, 44),
    st.integers(0, 99),
)
def test_drawn_ranks_keep_their_bounds_and_their_seed(distribution, low, span, seed):
    config = FleetConfig(clients=30, distribution=distribution, min_rank=low, max_rank=low + span)
    drawn = ranks(config, rank=64, seed=seed)
    assert all(low <= rank <= low + span for rank in drawn)
    assert drawn == ranks(config, rank=64, seed=seed)


@pytest.mark.parametrize(
    ("distribution", "mean", "median", "sd"),
    [("uniform", 16.5, 16.5, 9.23), ("normal", 16.5, 16.5, 5.17), ("heavy-tail-low", 8.5, 6, None)],
)
def test_distributions_have_the_stated_shape(distribution, mean, median, sd):
    drawn = np.array(ranks(FleetConfig(clients=20_000, distribution=distribution)))
    assert drawn.mean() == pytest.approx(mean, abs=0.25)
    assert np.median(drawn) == pytest.approx(median, abs=0.5)
    assert (drawn.min(), drawn.max()) == (1, 32)
    if sd is not None:
        assert drawn.std() == pytest.approx(sd, abs=0.15)


def test_largest_drawn_rank_is_the_servers_by_default():
    assert max(ranks(FleetConfig(clients=500, distribution="uniform"), rank=16)) == 16


def test_a_fleet_is_the_list_of_its_clients():
    """By position, by slice and in turn: the same clients, in plain numbers that JSON can hold."""
    fleet = build_fleet(FleetConfig(clients=5, distribution="uniform"), 16, [3, 1, 4, 1, 5], Rng(0))
    clients = list(fleet)
    assert [fleet[i] for i in range(5)] == clients
    assert fleet[-1] == clients[-1]
    assert fleet[1:4] == tuple(clients[1:4])
    assert [(client.id, client.examples) for client in fleet] == list(enumerate([3, 1, 4, 1, 5]))
    assert {type(number) for client in fleet for number in (client.id, client.rank, client.examples)} == {int}
    with pytest.raises(IndexError):
        fleet[5]


def test_sizes_must_fit_the_fleet():
    with pytest.raises(ValueError, match="2 sizes for 20 clients"):
        build_fleet(FleetConfig(), 8, [1, 2], Rng(0))


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(0, 99))
def test_cohorts_hold_different_clients_by_id(cohort, seed):
    fleet = build_fleet(FleetConfig(), 64, [10] * 20, Rng(0))
    chosen = sample_cohort(fleet, cohort, Rng(seed))
    ids = [client.id for client in chosen]
    assert len(ids) == cohort
    assert ids == sorted(set(ids))
    assert chosen == sample_cohort(fleet, cohort, Rng(seed))


@settings(deadline=None)
@given(st.integers(1, 20), st.integers(0, 25), st.integers(0, 99))
def test_spares_are_added_to_a_cohort_that_stays(cohort, spares, seed):
    fleet = build_fleet(FleetConfig(), 64, [10] * 20, Rng(0))
    chosen = sample_cohort(fleet, cohort, Rng(seed))
    more = with_spares(fleet, chosen, spares, Rng(seed).child("spares"))
    assert set(chosen) <= set(more)
    assert len(set(more)) == len(more) == min(cohort + spares, 20)
    assert list(more) == sorted(more, key=lambda client: client.id)
    assert more == with_spares(fleet, chosen, spares, Rng(seed).child("spares"))


def test_cohort_of_all_is_everybody_and_small_cohorts_reach_everybody():
    fleet = build_fleet(FleetConfig(), 64, [10] * 20, Rng(0))
    assert sample_cohort(fleet, "all", Rng(0)) == tuple(fleet)
    met = {client.id for round in range(60) for client in sample_cohort(fleet, 3, Rng(0).child(round))}
    assert met == set(range(20))
