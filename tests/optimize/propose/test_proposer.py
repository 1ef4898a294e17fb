"""What a prompt phase proposes."""

import dspy
import numpy as np

from copa_harness.evaluate import run_examples
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.optimize.propose.demos import labelled_demos, random_demos, set_sizes, traced_demos
from copa_harness.optimize.propose.instructions import rule_based
from copa_harness.optimize.propose.proposer import propose_demos, starting_points
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.trial_memory import SearchMemory
from copa_harness.optimize.step_budget import CallBudget
from tests.optimize.conftest import context_of


def test_random_demonstrations_show_every_label():
    labelled = [(dspy.Example(x=i), "abc"[i % 3]) for i in range(30)]
    generator = np.random.default_rng(0)
    sets = [random_demos(labelled, size, generator) for size in (9, 9, 9, 9, 3, 3)]
    assert [len(one) for one in sets] == [9] * 4 + [3] * 2
    for one in sets:
        kinds = ["abc"[demo.x % 3] for demo in one]
        assert len(set(kinds)) == 3
        assert max(kinds.count(kind) for kind in "abc") <= len(kinds) // 3 + 1


def test_sizes_beyond_what_there_is_are_cut():
    labelled = [(dspy.Example(x=i), "") for i in range(3)]
    assert len(random_demos(labelled, 9, np.random.default_rng(0))) == 3


def test_most_sets_are_large():
    assert set_sizes(9, 12) == [9] * 6 + [6] * 4 + [3] * 2
    assert set_sizes(0, 12) == []
    assert set_sizes(1, 5) == [1] * 5


def test_labelled_demonstrations_hold_only_the_signatures_fields(toy):
    pool = labelled_demos(dspy.Signature("size -> kind"), toy.train)
    assert len(pool) == len(toy.train)
    assert sorted(pool[0][0].keys()) == ["kind", "size"]


def test_bootstrapped_demonstrations_come_from_passing_traces_only(toy):
    program = toy.program()
    runs = run_examples(program, toy.train, metric=toy.metric, split="train", lm=toy.lm())
    (pool,) = traced_demos(program, toy.train, runs).values()
    assert {demo.kind for demo, _ in pool} == {"small"}
    assert len(pool) == sum(example.kind == "small" for example in toy.train)


def propose(toy, program, **settings):
    candidate = Candidate.of(program, lm=toy.lm())
    with open_scope("test") as scope:
        context = context_of(toy, candidate, n_demo_sets=12, **settings)
        allowance = CallBudget(scope, 100)
        options = propose_demos(context, candidate, allowance=allowance, memory=SearchMemory(), seed=(0, 1))
        return options, scope.charged_calls


def test_fully_labelled_predictors_cost_no_call_to_propose_for(toy):
    options, calls = propose(toy, toy.program())
    assert calls == 0
    assert options["self"][-1].demos == ()
    assert all("labelled" in option.name for option in options["self"][:-1])


def test_outputs_without_labels_are_bootstrapped_within_a_share_of_the_calls(toy):
    lm = ScriptedLM({"size": {"reasoning": "because", "kind": "small"}})
    toy.lm = lambda: lm
    options, calls = propose(toy, dspy.ChainOfThought("size, weight -> kind"))
    assert 0 < calls <= 20
    made = [option for option in options["predict"] if "bootstrapped" in option.name]
    assert made
    assert all(demo.reasoning == "because" for option in made for demo in option.demos)


def test_instructions_are_plain_rule_and_labels(toy):
    proposals = rule_based("self", toy.program().signature, "Tell.", trainset=toy.train, seed=0)
    options = [proposal.option for proposal in proposals]
    assert [option.name for option in options] == ["plain", "rule", "labels"]
    assert options[0].text == "Tell."
    assert options[1].text.startswith("Tell. If size is ")
    assert options[1].text.endswith(".")
    assert options[2].text == "Tell. Answer with one of: big, small."


def test_free_text_outputs_get_the_plain_instruction_alone(toy):
    rows = [dspy.Example(q=str(i), a=f"text {i}").with_inputs("q") for i in range(8)]
    proposals = rule_based("self", dspy.Signature("q -> a"), "Answer.", trainset=rows, seed=0)
    assert [proposal.option.name for proposal in proposals] == ["plain"]


def test_starting_points_try_every_instruction_with_and_without_demonstrations(toy):
    options, _ = propose(toy, toy.program())
    proposals = rule_based("self", toy.program().signature, "Tell.", trainset=toy.train, seed=0)
    instructions = {"self": [proposal.option for proposal in proposals]}
    points = starting_points(instructions, options)
    assert len(points) == 6
    assert points[0] == {"self.instruction": "plain", "self.demos": "9 labelled typical #1"}
    assert points[-1] == {"self.instruction": "labels", "self.demos": "none"}
