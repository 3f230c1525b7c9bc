"""All methods that average LoRA pairs, on one common set of uploads: how far each ends from the mean product.

    FLoRA = FedEx-LoRA = FLoRIST (tau 1) = FlexLoRA (all) = 0  ≤  best rank-k SVD  ≤  FLoRA-NA            ≤  FedIT
                                                                  best rank-k SVD  ≤  LoRA-FAIR, any λ ≥ 0 ≤  FedIT

Equal ranks and scales. What is compared is the global model after a round, less the base that its clients trained on,
with Σ p_i s B_i A_i of what they trained; in the first round as in a later one. Methods that share one factor cannot
be given the same uploads: RoLoRA, FFA-LoRA and RAC-LoRA are exact on their own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fslora.methods import Method
from fslora.methods.fedex_lora import FedExLoRA
from fslora.methods.fedit import FedIT
from fslora.methods.ffa_lora import FFALoRA
from fslora.methods.flexlora import FlexLoRA
from fslora.methods.flora import FLoRA
from fslora.methods.flora_na import FLoRANA
from fslora.methods.florist import FLoRIST
from fslora.methods.lora_fair import LoRAFAIR
from fslora.methods.rac_lora import RACLoRA
from fslora.methods.rolora import RoLoRA
from fslora.types import Adapter, Client, LoRA, Start, Template, Trained
from kit import TEMPLATE, World, begun, deltas, exchanges, fake_training, mean_product, plan, play

LAWS = settings(max_examples=25, deadline=None, derandomize=True, database=None)
# Products of float32 factors of size one, through a delta, a mean, a stack and an SVD, relative to the mean product.
ROUNDING = 2e-5

EXACT = {
    "flora": FLoRA(weighting="examples"),
    "fedex-lora": FedExLoRA(weighting="examples"),
    "florist, warm": FLoRIST(tau=1.0, weighting="examples"),
    "florist, merge": FLoRIST(tau=1.0, next_init="merge", weighting="examples"),
    "flexlora": FlexLoRA(keep="all", weighting="examples"),
}
BEST_PAIR = FlexLoRA(keep="server", weighting="examples")
FEDIT = FedIT(rank="server", weighting="examples")
BETWEEN = {
    "flora-na": FLoRANA(weighting="examples"),
    **{f"lora-fair, {x}": LoRAFAIR(penalty=x, weighting="examples") for x in (0.0, 0.01, 1.0, 100.0)},
}
OWN = {
    "rolora": RoLoRA(weighting="examples"),
    "ffa-lora": FFALoRA(weighting="examples"),
    "rac-lora, B": RACLoRA(weighting="examples"),
    "rac-lora, A": RACLoRA(side="A", sketch="gaussian", weighting="examples"),
}


@dataclass(frozen=True)
class Case:
    """One set of uploads: a template, a fleet of one rank, and how far the clients' factors lie apart."""

    template: Template
    fleet: tuple[Client, ...]
    drift: float
    seed: int

    def training(self, start: Start, client: Client, round) -> Trained:
        """Ends with the same A_i and B_i whatever it starts from; the head is trained by the kit's noise."""
        del round
        draw = torch.Generator().manual_seed(self.seed)

        def normal(rows: int, columns: int) -> torch.Tensor:
            common = torch.randn(rows, columns, generator=draw)
            own = torch.randn(len(self.fleet), rows, columns, generator=draw)
            return common + self.drift * own[self.fleet.index(client)]

        layers = {
            name: LoRA(normal(pair.rank, d_in), normal(pair.rank, d_out), pair.scale)
            for (name, pair), (d_in, d_out) in zip(
                start.adapter.layers.items(), self.template.layers.values(), strict=True
            )
        }
        return Trained(client.id, Adapter(layers, start.adapter.dense), (1.0,))


@st.composite
def cases(draw) -> Case:
    side = st.integers(3, 9)
    layers = {name: (draw(side), draw(side)) for name in ("first", "second")}
    rank = draw(st.integers(1, 4))
    counts = draw(st.lists(st.integers(1, 30), min_size=1, max_size=5))
    fleet = tuple(Client(number, rank, count) for number, count in enumerate(counts))
    template = replace(TEMPLATE, layers=layers, rank=rank, rslora=draw(st.booleans()))
    return Case(template, fleet, draw(st.sampled_from([0.1, 0.5, 2.0])), draw(st.integers(0, 10_000)))


def distances(method: Method, case: Case, training, rounds: int) -> dict[str, float]:
    """By layer: ‖global model - base of the clients - mean product‖, relative to the mean product, after some rounds.

    All but the last are trained by the kit's noise.
    """
    members = tuple(range(len(case.fleet)))
    world = begun(method, template=case.template, fleet=case.fleet)
    for number in range(rounds - 1):
        world = play(method, world, plan(number, members, case.fleet, case.template))
    round = plan(rounds - 1, members, case.fleet, case.template)
    passed = exchanges(method, world, round, training)
    ends = {name: [x.trained.adapter.layers[name] for x in passed] for name in case.template.layers}
    examples = [client.examples for client in case.fleet]
    mean = mean_product(ends, [count / sum(examples) for count in examples])
    base = method.base(world.state)
    before = deltas(base) if base else {}
    state = method.aggregate(world.state, iter([x.update for x in passed]), round)
    after = deltas(method.global_adapter(state))
    return {
        name: float((after[name] - before.get(name, 0.0) - product).norm() / product.norm())
        for name, product in mean.items()
    }


@LAWS
@given(cases(), st.sampled_from([1, 2]))
def test_the_chain_of_distances(case, rounds):
    """The chain of the module's docstring, layer by layer, for drawn shapes, ranks, weights, drifts and λ."""
    best = distances(BEST_PAIR, case, case.training, rounds)
    fedit = distances(FEDIT, case, case.training, rounds)
    for name, method in EXACT.items():
        for layer, distance in distances(method, case, case.training, rounds).items():
            assert distance <= ROUNDING, f"{name} is not exact: {layer}"
    for name, method in BETWEEN.items():
        for layer, distance in distances(method, case, case.training, rounds).items():
            assert best[layer] <= distance + ROUNDING, f"{name} beats the best pair: {layer}"
            assert distance <= fedit[layer] + ROUNDING, f"{name} is worse than FedIT: {layer}"


@LAWS
@given(cases())
def test_the_best_pair_is_the_truncated_svd(case):
    """Eckart-Young: what FlexLoRA at the server's rank leaves is the root of the discarded squared singular values."""
    passed = exchanges(
        BEST_PAIR,
        begun(BEST_PAIR, template=case.template, fleet=case.fleet),
        plan(0, tuple(range(len(case.fleet))), case.fleet, case.template),
        case.training,
    )
    examples = [client.examples for client in case.fleet]
    ends = {name: [x.trained.adapter.layers[name] for x in passed] for name in case.template.layers}
    best = distances(BEST_PAIR, case, case.training, 1)
    for name, product in mean_product(ends, [count / sum(examples) for count in examples]).items():
        S = torch.linalg.svdvals(product)
        tail = S[case.template.rank :].square().sum().sqrt() / S.square().sum().sqrt()
        assert best[name] == pytest.approx(float(tail), abs=ROUNDING)


@pytest.mark.parametrize("name", OWN)
@LAWS
@given(case=cases(), rounds=st.integers(1, 3))
def test_exact_on_their_own_uploads(name, case, rounds):
    """RoLoRA, FFA-LoRA, RAC-LoRA: one factor is common, so the mean of the other gives the mean product."""
    for layer, distance in distances(OWN[name], case, fake_training(), rounds).items():
        assert distance <= ROUNDING, layer


def test_the_inequalities_are_strict_somewhere():
    """Four clients of rank 2 that drift by half: every step of the chain is a gain of a percent or more, but λ = 100's.

    So nothing in the chain is equal for want of a difference. LoRA-FAIR and FLoRA-NA have no order.
    """
    fleet = tuple(Client(number, 2, examples) for number, examples in enumerate((5, 1, 20, 3)))
    template = replace(TEMPLATE, layers={"up": (9, 7)}, rank=2)
    case = Case(template, fleet, 0.8, 1)
    (best,), (fedit,) = (distances(m, case, case.training, 2).values() for m in (BEST_PAIR, FEDIT))
    between = {name: distances(m, case, case.training, 2)["up"] for name, m in BETWEEN.items()}
    assert best > 0.05
    for name in ("flora-na", "lora-fair, 0.0", "lora-fair, 0.01", "lora-fair, 1.0"):
        assert 1.01 * best < between[name] < 0.99 * fedit, name
    assert between["lora-fair, 0.01"] < between["lora-fair, 1.0"] < between["lora-fair, 100.0"] < fedit


def test_fedit_is_not_exact_on_its_own_uploads():
    """Negative: where both factors are trained, their means do not give the mean product; the tests above can fail."""
    fleet = tuple(Client(number, 2, examples) for number, examples in enumerate((5, 1, 20, 3)))
    case = Case(replace(TEMPLATE, rank=2), fleet, 0.5, 1)
    assert min(distances(FEDIT, case, fake_training(), 2).values()) > 100 * ROUNDING


def test_the_world_of_a_case_is_what_it_says():
    """The uploads are common: every method's clients end with the same factors, from whatever start."""
    fleet = tuple(Client(number, 2, 1) for number in range(3))
    case = Case(replace(TEMPLATE, rank=2), fleet, 0.5, 1)
    ends = []
    for method in (*EXACT.values(), FEDIT, BEST_PAIR, *BETWEEN.values()):
        world: World = begun(method, template=case.template, fleet=fleet)
        world = play(method, world, plan(0, (0, 1, 2), fleet, case.template))
        passed = exchanges(method, world, plan(1, (0, 1, 2), fleet, case.template), case.training)
        ends.append(torch.cat([x.trained.adapter.layers["down"].A for x in passed]))
        assert {x.trained.adapter.layers["down"].scale for x in passed} == {case.template.scale(2)}
    assert all(torch.equal(end, ends[0]) for end in ends)
