"""Choosing routes on hand-made layers, and the report of a plan."""

import itertools
import random as chance

import pytest
import torch
from torch import nn

import dpfast
from dpfast.grad_sample import planner
from dpfast.grad_sample._budget import Profile
from dpfast.grad_sample._deferred import LinearGradient
from dpfast.grad_sample.planner import (
    Cost,
    Layer,
    Plan,
    Route,
    Timeline,
    choose_routes,
    fastest,
    leanest,
    weigh,
)
from tests.grad_sample.helpers import by_route, energy, forced, mixed_batch, mixed_net

KEEP, RECOMPUTE, GHOST = Route


def layer(name, keep, held, works=(10.0, 20.0, 30.0)):
    """A layer of `keep` bytes that would hold `held`; works by route, None for no such route."""
    costs = {}
    for route, work in zip(Route, works, strict=True):
        if work is not None:
            costs[route] = Cost(work, keep if route is KEEP else sum(held.values()))
    return Layer(name=name, costs=costs, held=held, route=KEEP, bytes=0)


def kept_layer(name):
    """One that is kept in any case; its bytes are part of the timeline's."""
    return Layer(name=name, costs={}, held={}, route=KEEP, bytes=0)


def timeline(*peaks, end=0):
    return Timeline(batch_size=1, peaks=peaks, end=end, ordinary=max(peaks))


def peak_of(layers, routes, line):
    return max(planner._predicted(layers, routes, line))


def work_of(layers, routes):
    return sum(
        each.costs[route].work for each, route in zip(layers, routes, strict=True) if each.costs
    )


def exhaustive(layers, line):
    """(peak, work, routes) of every combination."""
    for routes in itertools.product(*(list(each.costs) or [KEEP] for each in layers)):
        yield peak_of(layers, routes, line), work_of(layers, routes), routes


@pytest.fixture
def bounded_search(monkeypatch):
    """Fails a search that never ends."""
    predicted, calls = planner._predicted, [0]

    def counted(*args):
        calls[0] += 1
        assert calls[0] < 20_000, "the search does not end"
        return predicted(*args)

    monkeypatch.setattr(planner, "_predicted", counted)
    return calls


# --- costs ---


def gradient(batch_size, positions, width):
    x = torch.zeros(batch_size, positions, width)
    return LinearGradient("w", torch.zeros(width, width), batch_size, x, x + 1, 0)


def test_weigh_counts_the_bytes_of_what_stays():
    costs = weigh(gradient(3, 5, 7))
    assert costs[KEEP].bytes == 3 * 7 * 7 * 4
    assert costs[RECOMPUTE].bytes == costs[GHOST].bytes == 2 * 3 * 5 * 7 * 4


def test_weigh_counts_memory_behind_both_ends_once():
    x = torch.zeros(2, 3, 4, 8)
    shared = LinearGradient("w", torch.zeros(4, 4), 2, x[..., :4], x[..., 4:], 0)
    assert weigh(shared)[RECOMPUTE].bytes == x.numel() * 4


def test_weigh_finds_that_few_positions_defer_and_many_keep():
    assert fastest(weigh(gradient(8, 1, 512))) is not KEEP
    assert fastest(weigh(gradient(8, 1, 16))) is KEEP  # not worth the calls
    assert fastest(weigh(gradient(8, 4096, 8))) is KEEP
    assert leanest(weigh(gradient(8, 1, 512))) is not KEEP
    assert leanest(weigh(gradient(8, 4096, 8))) is KEEP


def test_weigh_offers_no_ghost_norms_whose_inner_products_outgrow_the_gradients():
    assert GHOST in weigh(gradient(2, 64, 8))
    assert GHOST not in weigh(gradient(2, 2048, 8))


def test_weigh_grows_with_the_batch():
    small, middle, large = (weigh(gradient(size, 500, 7)) for size in (2, 4, 6))
    for route in Route:
        step = middle[route].work - small[route].work
        assert step > 0
        assert large[route].work - middle[route].work == pytest.approx(step)
        assert large[route].bytes == 3 * small[route].bytes


def test_leanest_takes_the_faster_of_equals():
    costs = {KEEP: Cost(1.0, 9), RECOMPUTE: Cost(8.0, 4), GHOST: Cost(3.0, 4)}
    assert leanest(costs) is GHOST
    assert fastest(costs) is KEEP


# --- predicted peaks ---


def test_predicted_peaks_add_up_what_is_held():
    layers = [layer("a", 10, {1: 3, 2: 4}), kept_layer("b"), layer("c", 20, {3: 5})]
    line = timeline(100, 90, 80, 70, end=50)
    assert planner._predicted(layers, [KEEP, KEEP, KEEP], line) == [100, 100, 90, 100, 80]
    # At the end a weighted copy of what the largest holds.
    found = planner._predicted(layers, [RECOMPUTE, KEEP, GHOST], line)
    assert found == [100, 97, 87, 82, 50 + 12 + 7]


def test_memory_held_for_two_layers_counts_once():
    layers = [layer("a", 10, {1: 3, 2: 4}), layer("b", 20, {1: 3, 5: 6})]
    line = timeline(0, 0, 0)
    found = planner._predicted(layers, [RECOMPUTE, RECOMPUTE], line)
    assert found[1:3] == [7, 13]
    assert planner._predicted(layers, [RECOMPUTE, KEEP], line)[1:3] == [7, 27]
    assert planner._predicted(layers, [KEEP, GHOST], line)[1:3] == [10, 19]


# --- the search ---


def test_fastest_routes_stand_where_they_fit():
    layers = [layer("a", 10, {1: 3}), layer("b", 10, {2: 3}, (9.0, 5.0, 7.0)), kept_layer("c")]
    routes, peak = choose_routes(layers, timeline(50, 60, 40, 10), 100)
    assert routes == [KEEP, RECOMPUTE, KEEP]
    assert peak == 70


def test_route_that_saves_most_for_its_work_changes_first():
    layers = [
        layer("a", 100, {1: 10}, (10.0, 100.0, None)),
        layer("b", 100, {2: 10}, (10.0, 20.0, None)),
        layer("c", 100, {3: 10}, (10.0, 100.0, 90.0)),
    ]
    line = timeline(0, 0, 0, 0)
    assert choose_routes(layers, line, 300)[0] == [KEEP, KEEP, KEEP]
    assert choose_routes(layers, line, 250)[0] == [KEEP, RECOMPUTE, KEEP]
    assert choose_routes(layers, line, 130)[0] == [KEEP, RECOMPUTE, GHOST]
    routes, peak = choose_routes(layers, line, 40)
    assert routes == [RECOMPUTE, RECOMPUTE, GHOST]
    assert peak == 40


def test_layers_after_the_peak_are_left_alone():
    layers = [layer("early", 50, {1: 5}), layer("late", 50, {2: 5})]
    routes, peak = choose_routes(layers, timeline(10, 100, 20), 120)
    assert routes == [RECOMPUTE, KEEP]
    assert peak == 105


def test_budget_that_nothing_fits_in_is_exceeded_by_as_little_as_can_be():
    layers = [layer("a", 50, {1: 5}), layer("b", 50, {2: 5})]
    routes, peak = choose_routes(layers, timeline(10, 100, 20), 60)
    assert peak == 105
    assert routes[0] is not KEEP
    assert peak == min(found for found, *_ in exhaustive(layers, timeline(10, 100, 20)))


def test_no_layer_that_defers_leaves_the_timeline_as_it_is():
    assert choose_routes([], timeline(7), 3) == ([], 7)
    assert choose_routes([kept_layer("a")], timeline(7, 9), 20) == ([KEEP], 9)


def test_search_ends_where_two_peaks_would_change_places(bounded_search):
    # KEEP has the first peak at 100, RECOMPUTE, with its copy, the end.
    layers = [layer("a", 10, {1: 9}, (1.0, 2.0, None)), layer("b", 82, {2: 99}, (1.0, None, None))]
    line = Timeline(batch_size=1, peaks=[0, 90, 0], end=0, ordinary=90)
    peaks = [peak for peak, *_ in exhaustive(layers, line)]
    routes, peak = choose_routes(layers, line, 95)
    assert peak == peak_of(layers, routes, line)
    assert peak == min(peaks)


def test_search_finds_routes_that_fit_though_each_alone_costs_a_copy():
    # A single change saves one byte and adds a copy of nine; twenty changes save twenty.
    layers = [layer(str(k), 10, {k: 9}) for k in range(20)]
    line = timeline(*[0] * 21)
    assert peak_of(layers, [RECOMPUTE] * 20, line) == 189
    assert choose_routes(layers, line, 195)[1] <= 195


def test_search_finds_routes_that_fit_though_layers_share_what_they_hold():
    # Each alone would add its gradient to what the other still holds.
    works = (20.0, 10.0, None)
    layers = [layer("a", 10, {1: 15}, works), layer("b", 3, {1: 15}, works)]
    line = timeline(0, 0, 0)
    assert peak_of(layers, [KEEP, KEEP], line) == 13
    assert choose_routes(layers, line, 14)[1] <= 14


def instance(seed):
    """A few layers, some of which hold the same input, and a budget between the extremes."""
    dice = chance.Random(seed)
    layers, count = [], dice.randint(1, 5)
    sizes = [dice.randint(1, 30) for _ in range(2 * count + 1)]
    for index in range(count):
        if dice.random() < 0.1:
            layers.append(kept_layer(str(index)))
            continue
        own, other = 2 * index, 2 * index + (1 if dice.random() < 0.7 or index == 0 else -1)
        base, keep = dice.randint(1, 50), dice.randint(1, 60)
        works = (base + 2.0 * keep, 2.0 * base + dice.randint(0, 20), base + dice.randint(1, 80))
        held = {own: sizes[own], other: sizes[other]}
        layers.append(layer(str(index), keep, held, works))
    peaks = [dice.randint(0, 100) for _ in range(count + 1)]
    line = Timeline(batch_size=1, peaks=peaks, end=dice.randint(0, 100), ordinary=max(peaks))
    found = [peak for peak, *_ in exhaustive(layers, line)]
    return layers, line, dice.randint(min(found), max(found))


def searched(seed):
    layers, line, budget = instance(seed)
    routes, peak = choose_routes(layers, line, budget)
    assert peak == peak_of(layers, routes, line)
    assert all(route in (each.costs or {KEEP}) for each, route in zip(layers, routes, strict=True))
    return layers, line, budget, routes, peak


def test_search_fits_wherever_the_leanest_routes_fit(bounded_search):
    missed = []
    for seed in range(400):
        bounded_search[0] = 0
        layers, line, budget, _, peak = searched(seed)
        lean = [leanest(each.costs) if each.costs else KEEP for each in layers]
        if peak > budget and peak_of(layers, lean, line) <= budget:
            missed.append(seed)
    assert not missed


def test_search_does_little_more_work_than_the_best_routes(bounded_search):
    ratios = []
    for seed in range(400):
        bounded_search[0] = 0
        layers, line, budget, routes, peak = searched(seed)
        if peak <= budget:
            best = min(work for found, work, _ in exhaustive(layers, line) if found <= budget)
            ratios.append(work_of(layers, routes) / best if best else 1.0)
    assert len(ratios) > 350
    assert max(ratios) <= 1.5
    assert sum(ratios) / len(ratios) <= 1.02


# --- profiles ---


def test_bytes_and_share_are_not_taken_for_one_another():
    # 2 == 2.0, but two bytes are not twice the ordinary step.
    layers = (layer("a", 100, {1: 10}),)
    line = Timeline(batch_size=8, peaks=(50, 60), end=0, ordinary=100)
    profile = Profile(layers, line)
    assert profile.choose(2.0, 8).routes == {"a": KEEP}
    assert profile.choose(2, 8).routes == {"a": RECOMPUTE}
    assert profile.choose(2, 8).predicted == 70
    assert profile.choose(2.0, 8).predicted == 160


def test_profile_scales_with_the_batch():
    profile = Profile((layer("a", 100, {1: 10}),), Timeline(8, (50, 60), 0, 100))
    assert profile.choose(120, 8).routes == {"a": RECOMPUTE}
    assert profile.choose(120, 4).routes == {"a": KEEP}
    assert profile.choose(120, 4).predicted == 80
    for batch_size in (1, 4, 64):
        assert profile.choose(1.2, batch_size).routes == {"a": RECOMPUTE}
        assert profile.choose(1.7, batch_size).routes == {"a": KEEP}


# --- plans ---


def lines_of(plan, capsys):
    plan.report()
    return capsys.readouterr().out.splitlines()


def test_report_is_a_table_of_all_layers(capsys):
    model = mixed_net()
    for route in Route:
        grads = by_route(route, model, energy, mixed_batch())
        head, *rows, last = lines_of(grads.plan, capsys)
        assert head.split() == ["layer", "route", "time", "memory"]
        assert [row.split()[0] for row in rows] == [f"{k}.weight" for k in (9, 7, 5, 3, 0)]
        for row, each in zip(rows, grads.plan.layers, strict=True):
            assert row.split()[1] == each.route.value
            assert row.split()[2:4] == [f"{1e3 * each.seconds:.2f}", "ms"]
            assert row.split()[4:] == [f"{each.bytes / 2**20:.2f}", "MiB"]
        assert len({len(row) for row in (head, *rows)}) == 1
        assert last == "B = 6"


def test_report_tells_budget_and_peaks(capsys):
    plan = Plan((), 3, budget=2**21, ordinary=2**20, predicted=3 * 2**19)
    assert lines_of(plan, capsys) == [
        "layer  route  time  memory",
        "B = 3, budget 2.00 MiB, ordinary 1.00 MiB, predicted 1.50 MiB",
    ]
    unknown = layer("a", 1, {})
    assert lines_of(Plan((unknown,), 1), capsys)[1].split() == ["a", "keep", "-", "0.00", "MiB"]


def test_bytes_of_layers_are_those_of_what_stays():
    model, x = mixed_net(), mixed_batch()
    for route in Route:
        grads = by_route(route, model, energy, x)
        parts = grads.parts()
        for each in grads.plan.layers:
            part = parts[each.name]
            if each.route is KEEP:
                assert each.bytes == part.numel() * part.element_size()
            else:
                storages = {t.data_ptr(): t for t in map(torch.Tensor.untyped_storage, part.held)}
                assert each.bytes == sum(storage.nbytes() for storage in storages.values())


def test_seconds_of_a_layer_grow_with_its_clipped_sum():
    grads = by_route(RECOMPUTE, mixed_net(), energy, mixed_batch())
    before = [each.seconds for each in grads.plan.layers]
    dpfast.clip_and_noise(grads, max_grad_norm=1.0, noise_multiplier=1.0)
    after = [each.seconds for each in grads.plan.layers]
    assert all(0 < first < second for first, second in zip(before, after, strict=True))


def test_weight_used_twice_is_reported_as_kept_at_its_real_size():
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
    x = torch.randn(3, 4)
    with forced(RECOMPUTE), dpfast.per_sample_gradients(model) as grads:
        (energy(model, x) + energy(model, 2 * x)).sum().backward()
    layers = [each for each in grads.plan.layers if each.name == "0.weight"]
    assert all(each.route is KEEP for each in layers)
    assert sum(each.bytes for each in layers) == grads["0.weight"].numel() * 4


def test_plan_without_a_budget_knows_no_peaks():
    plan = by_route(KEEP, mixed_net(), energy, mixed_batch()).plan
    assert (plan.budget, plan.ordinary, plan.predicted) == (None, None, None)
    assert plan.batch_size == 6
