"""The memory of a run: which options gained, which demonstrations carried weight, what an instruction settles."""

import numpy as np
import pytest

from copa_harness.lm.call_context import open_scope
from copa_harness.optimize.propose.demos import labelled_demos
from copa_harness.optimize.propose.proposer import propose_demos
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.space import DemoSet
from copa_harness.optimize.search.trial_memory import SearchMemory, demo_key
from copa_harness.optimize.step_budget import CallBudget
from tests.optimize.conftest import context_of


@pytest.fixture
def student(toy):
    return Candidate.of(toy.program(), lm=toy.lm())


def pool_of(toy):
    return [demo for demo, _ in labelled_demos(toy.program().signature, toy.train)]


def tried(memory, student, pool, *, n=60, helpful=2, seed=0):
    """Tell the memory of `n` random sets, whose score depends on one demonstration alone."""
    generator = np.random.default_rng(seed)
    trials, scores = [], {student.key: [0.0, 1.0] * 10}
    for _ in range(n):
        rows = sorted(generator.permutation(len(pool))[:4].tolist())
        one = DemoSet("x", tuple(pool[i] for i in rows))
        memory.note_demos("self", one, "demos: labelled")
        candidate = student.with_demos({"self": one.demos})
        share = 0.9 if helpful in rows else 0.6
        scores[candidate.key] = [float(generator.random() < share) for _ in range(20)]
        trials.append((candidate, "complete"))
    memory.note_study("p", student, trials, scores)


def test_demonstrations_that_carried_weight_are_found_in_the_trials(toy, student):
    memory, pool = SearchMemory(), pool_of(toy)
    tried(memory, student, pool)
    assert memory.helpful_demos("self", pool, n=1) == [pool[2]]
    weights = memory.demo_effects("self", pool)
    assert max(range(len(pool)), key=lambda i: weights[i][0]) == 2
    row_weights = memory.row_weights("self", pool)
    assert row_weights is not None
    assert row_weights[2] == 3.0
    assert min(row_weights) == 1.0


def test_without_trials_no_row_counts_more_and_no_demonstration_is_known_to_help(toy):
    memory, pool = SearchMemory(), pool_of(toy)
    assert memory.row_weights("self", pool) is None
    assert memory.helpful_demos("self", pool) == []
    assert memory.drawn_effects("self", pool, n_draws=2, generator=np.random.default_rng(0)) == []


def test_weighty_sets_show_what_raised_the_score(toy, student):
    memory, pool = SearchMemory(), pool_of(toy)
    tried(memory, student, pool, n=120)
    draws = memory.drawn_effects("self", pool, n_draws=20, generator=np.random.default_rng(0))
    ranks = [sorted(draw, reverse=True).index(draw[2]) for draw in draws]
    assert np.mean(ranks) < 4


def test_an_option_is_credited_to_the_arm_that_proposed_it_first(toy, student):
    memory = SearchMemory()
    memory.note_instruction("self", "Be bold.", "instruction: written", "tip: short")
    memory.note_instruction("self", "Be bold.", "instruction: reflected")
    bold = student.with_instructions({"self": "Be bold."})
    memory.note_study(
        "p", student, [(student, "complete"), (bold, "dropped")], {student.key: [0.0] * 6, bold.key: [1.0] * 5}
    )
    assert {(row["family"], row["arm"]) for row in memory.report()} == {("instruction", "written"), ("tip", "short")}
    assert memory.n_trials == 2
    assert memory.records[1]["arms"] == {"instruction: written": 1, "tip: short": 1}
    assert memory.records[1]["n"] == 5
    assert memory.records[1]["gain"] == 1.0


def test_settings_kept_from_the_incumbent_earn_nothing(toy, student):
    memory = SearchMemory()
    memory.note_demos("self", DemoSet("x", tuple(pool_of(toy)[:3])), "demos: labelled")
    shown = student.with_demos({"self": tuple(pool_of(toy)[:3])})
    reworded = shown.with_instructions({"self": "Other words."})
    memory.note_study("i", shown, [(reworded, "complete")], {shown.key: [1.0] * 4, reworded.key: [1.0] * 4})
    assert [row["family"] for row in memory.report()] == ["instruction"]


def propose(toy, candidate, memory, *, seed=0, **more):
    with open_scope("test") as scope:
        context = context_of(toy, candidate, n_demo_sets=12, **more)
        return propose_demos(context, candidate, allowance=CallBudget(scope, 100), memory=memory, seed=(seed, 1))


def test_the_incumbents_set_is_varied_a_little(toy, student):
    memory, pool = SearchMemory(), pool_of(toy)
    tried(memory, student, pool, n=2)
    shown = student.with_demos({"self": tuple(pool[:9])})
    sets = [one for seed in range(4) for one in propose(toy, shown, memory, seed=seed)["self"] if "mutated" in one.name]
    assert sets
    for one in sets:
        kept = [new == old for new, old in zip(one.demos, pool[:9], strict=True)]
        assert 6 <= sum(kept) <= 8
        assert len({demo_key(demo) for demo in one.demos}) == 9


def test_proposals_are_the_same_for_the_same_seed(toy, student):
    def names():
        memory = SearchMemory(seed=3)
        tried(memory, student, pool_of(toy), n=6)
        return [(one.name, one.demos) for one in propose(toy, student, memory)["self"]]

    assert names() == names()
