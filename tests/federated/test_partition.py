import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dpfast.federated import dirichlet_sites, iid_sites, natural_sites


def make_records(patients, *, per_patient=1, columns=("a", "b", "c")):
    empty = np.zeros((2, 2))
    return [
        {
            "image": empty,
            "label": empty,
            "patient_id": f"p{patient}",
            "name": f"{patient}-{index}",
            "columns": {"kind": columns[patient % len(columns)]},
        }
        for patient in range(patients)
        for index in range(per_patient)
    ]


def names(sites):
    return {site: sorted(record["name"] for record in own) for site, own in sites.items()}


def deal(kind, records, number, seed):
    if kind == "iid":
        return iid_sites(records, number, seed=seed)
    return dirichlet_sites(records, number, alpha=1.0, key="kind", seed=seed)


@settings(max_examples=60, deadline=None)
@given(
    kind=st.sampled_from(["iid", "dirichlet"]),
    patients=st.integers(12, 60),
    per_patient=st.integers(1, 3),
    number=st.integers(2, 5),
    seed=st.integers(0, 2**31),
    order=st.randoms(use_true_random=False),
)
def test_every_record_is_at_one_site_and_patients_stay_whole(
    kind, patients, per_patient, number, seed, order
):
    records = make_records(patients, per_patient=per_patient)
    sites = deal(kind, records, number, seed)
    assert list(sites) == sorted(sites)
    assert len(sites) == number
    assert all(sites.values())
    dealt = [name for own in names(sites).values() for name in own]
    assert sorted(dealt) == sorted(r["name"] for r in records)
    homes = {}
    for site, own in sites.items():
        for record in own:
            assert homes.setdefault(record["patient_id"], site) == site
    shuffled = list(records)
    order.shuffle(shuffled)
    assert names(deal(kind, shuffled, number, seed)) == names(sites)


def test_iid_sites_are_even_and_follow_the_seed():
    records = make_records(23)
    sizes = [len(own) for own in iid_sites(records, 4).values()]
    assert sorted(sizes) == [5, 6, 6, 6]
    assert names(iid_sites(records, 4, seed=1)) != names(iid_sites(records, 4))


def test_a_small_alpha_makes_sites_unlike():
    records = make_records(600)

    def unlikeness(alpha):
        found = []
        for seed in range(5):
            sites = dirichlet_sites(records, 3, alpha=alpha, key="kind", seed=seed)
            shares = np.array(
                [
                    [sum(r["columns"]["kind"] == k for r in own) / len(own) for k in "abc"]
                    for own in sites.values()
                ]
            )
            found.append(np.abs(shares - 1 / 3).mean())
        return np.mean(found)

    assert unlikeness(0.1) > 0.25
    assert unlikeness(1000.0) < 0.05


def test_shares_have_the_moments_of_the_distribution():
    # One category: a site's share of n patients has mean 1/K and variance (K-1)/(K^2 (K a + 1)).
    records = make_records(2000, columns=("a",))
    alpha, number = 2.0, 3
    shares = np.array(
        [
            [len(own) / 2000 for own in sites.values()]
            for sites in (
                dirichlet_sites(records, number, alpha=alpha, key="kind", seed=seed)
                for seed in range(150)
            )
        ]
    )
    wanted = (number - 1) / (number**2 * (number * alpha + 1))
    assert np.abs(shares.mean(0) - 1 / number).max() < 5 * np.sqrt(wanted / 150)
    assert 0.6 * wanted < shares.var() < 1.6 * wanted


def test_natural_sites_follow_the_column():
    sites = natural_sites(make_records(9), "kind")
    assert names(sites) == {
        "a": ["0-0", "3-0", "6-0"],
        "b": ["1-0", "4-0", "7-0"],
        "c": ["2-0", "5-0", "8-0"],
    }


def test_a_patient_at_two_sites_is_refused_without_being_named():
    records = make_records(4, per_patient=2)
    records[1]["columns"] = {"kind": "b"}
    with pytest.raises(ValueError, match="each patient must be at one site") as caught:
        natural_sites(records, "kind")
    assert "p0" not in str(caught.value)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda r: natural_sites(r, "hospital"), "must have a value of 'hospital', got none"),
        (lambda r: natural_sites([r[0], r[3]], "kind"), "two values or more, got 1"),
        (lambda r: iid_sites(r, 1), "num_sites must be an int >= 2, got 1"),
        (lambda r: iid_sites(r, 7), "num_sites must be <= 6"),
        (lambda r: iid_sites(r, 2, seed=-1), "seed must be an int >= 0"),
        (lambda r: dirichlet_sites(r, 2, alpha=0.0, key="kind"), "alpha must be finite, > 0"),
        (lambda r: dirichlet_sites(r, 2, alpha=1.0, key="x"), "must have a value of 'x'"),
        (lambda r: dirichlet_sites(r, 6, alpha=1e-6, key="kind"), "alpha must leave a patient"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call(make_records(6))
