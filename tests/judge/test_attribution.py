import itertools

import numpy as np
import pytest

from copa_harness.judge.attribution import attribute_gains
from copa_harness.judge.paired_tests import PairedScores, paired_difference

IDS = [f"e{i:03}" for i in range(60)]


def cell(values):
    return dict(zip(IDS, [float(v) for v in values], strict=True))


def random_cells(seed=0):
    rng = np.random.default_rng(seed)
    shares = (0.4, 0.6, 0.55, 0.9)
    return [cell(rng.random(60) < share) for share in shares]


def answer(cells, **more):
    names = ("base_plain", "base_optimized", "tuned_plain", "tuned_optimized")
    return attribute_gains(**dict(zip(names, cells, strict=True)), **more)


def test_the_interaction_is_what_both_gain_beyond_the_sum():
    cells = random_cells()
    means = [np.mean(list(c.values())) for c in cells]
    found = answer(cells)
    assert found.interaction.difference == pytest.approx(means[3] - means[1] - means[2] + means[0])
    assert found.both.difference == pytest.approx(
        found.weights.difference + found.prompts.difference + found.interaction.difference
    )
    assert found.interaction.difference == pytest.approx(found.prompts_on_tuned.difference - found.prompts.difference)


def test_every_gain_is_the_paired_difference_of_its_cells():
    cells = random_cells(1)
    expected = paired_difference(PairedScores(IDS, list(cells[0].values()), list(cells[3].values())))
    assert answer(cells).both == expected


def test_the_interaction_lies_inside_its_interval():
    for seed in range(5):
        found = answer(random_cells(seed)).interaction
        assert found.interval.low <= found.difference <= found.interval.high
        assert found.interval.low >= -2
        assert found.interval.high <= 2


def test_its_p_value_is_that_of_all_exchanges_of_sign():
    cells = [
        {f"e{i}": float(v) for i, v in enumerate(values)}
        for values in ([0, 0, 1, 0, 0, 0], [0, 0, 1, 0, 1, 0], [0, 1, 1, 0, 0, 0], [1, 1, 1, 1, 1, 1])
    ]
    interaction = [d - b - c + a for a, b, c, d in zip(*(list(cell.values()) for cell in cells), strict=True)]
    moved = [value for value in interaction if value]
    sums = [
        sum(s * v for s, v in zip(signs, moved, strict=True)) for signs in itertools.product([-1, 1], repeat=len(moved))
    ]
    share = np.mean([total >= sum(moved) - 1e-9 for total in sums])
    assert answer(cells).interaction.p_value == pytest.approx(min(1, 2 * share))


def test_what_full_marks_force_is_not_called_overlap():
    """Two gains of .5 from .3 would be 1.3; that both gain .7 says nothing of whether they mend the same rows."""
    n = 60
    first = [i < 18 for i in range(n)]
    prompts, weights = [i < 48 for i in range(n)], [i < 18 or i >= 30 for i in range(n)]
    forced = answer([cell(v) for v in (first, prompts, weights, [True] * n)])
    assert forced.interaction.interval.high < 0
    assert "says nothing of overlap" in forced.sentence()
    shared = answer([cell(v) for v in (first, prompts, prompts, prompts)])
    assert "they overlap" in shared.sentence()


def test_effects_that_add_up_are_not_called_more_than_that():
    rng = np.random.default_rng(3)
    plain = rng.uniform(0.2, 0.4, 60)
    cells = [cell(v) for v in (plain, plain + 0.1, plain + 0.2, plain + 0.3)]
    found = answer(cells)
    assert found.interaction.difference == pytest.approx(0, abs=1e-9)
    assert "cannot be told from simply adding up" in found.sentence()


def test_a_shared_gain_is_said_to_overlap():
    cells = [
        cell([0.0] * 60),
        cell([1.0] * 50 + [0.0] * 10),
        cell([1.0] * 50 + [0.0] * 10),
        cell([1.0] * 50 + [0.0] * 10),
    ]
    assert "they overlap" in answer(cells).sentence()


def test_a_gain_of_both_only_is_said_to_need_both():
    cells = [cell([0.0] * 60)] * 3 + [cell([1.0] * 50 + [0.0] * 10)]
    found = answer(cells)
    assert "optimize them together" in found.sentence()
    assert "0.833 more than the sum" in found.sentence()


def test_only_examples_with_a_score_in_all_four_count():
    cells = random_cells()
    cells[2]["e000"] = None
    assert answer(cells).n == 59
    with pytest.raises(ValueError, match="in all four cells"):
        answer([*cells[:3], {"other": 1.0}])


def test_groups_widen_what_is_known():
    cells = random_cells(4)
    grouped = answer(cells, groups={key: str(i // 3) for i, key in enumerate(IDS)})
    assert grouped.interaction.n_groups == 20
    assert grouped.both.method == "paired permutation of groups"


def test_the_numbers_survive_as_json():
    document = answer(random_cells()).numbers()
    assert set(document["cells"]) == {"base_plain", "base_optimized", "tuned_plain", "tuned_optimized"}
    assert document["effects"]["interaction"]["low"] <= document["effects"]["interaction"]["difference"]
