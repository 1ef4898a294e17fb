"""What a DSPy optimizer evaluates is remembered, held to the budget, and paid for once."""

import random
import time

import dspy
import pytest
from dspy.teleprompt import mipro_optimizer_v2

from copa_harness import COPA
from copa_harness.errors import BudgetExhausted
from copa_harness.lm.call_context import open_scope
from copa_harness.lm.scripted import ScriptedLM
from copa_harness.optimize import steps as optimizer_step
from copa_harness.optimize.dspy_optimizers import registry
from copa_harness.optimize.dspy_optimizers.builders import scores_its_result
from copa_harness.optimize.dspy_optimizers.student import Evaluations
from copa_harness.optimize.run import Run
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.step_budget import CallBudget, step_scope
from copa_harness.results import Budget

RANDOM_SEARCH = "bootstrap_fewshot_random_search"


def compiled(toy, strategy, *, lm=None, n_val=16, **given):
    optimizer = COPA(metric=toy.metric, strategy=strategy, lm=lm or toy.lm(), threads=8, **given)
    return optimizer.compile(toy.program(), trainset=toy.train, valset=toy.make_rows(n_val, seed=2)).copa_result


def test_an_optimizer_that_scores_its_result_itself_may_use_the_whole_budget(toy):
    lm = toy.lm()
    result = compiled(toy, RANDOM_SEARCH, lm=lm, n_val=120, budget=400)
    # Not 280: with the program as written, that with labels and the bootstrapped one three programs were scored.
    assert 360 <= result.charged_calls <= 400
    assert lm.calls <= 400
    assert result.score_after > result.score_before


def test_the_result_of_a_simple_optimizer_is_still_paid_for(toy):
    result = compiled(toy, "labeled_fewshot", budget=32)
    assert result.charged_calls == 32
    assert result.score_after > result.score_before


@pytest.mark.parametrize(
    ("name", "kwargs", "n", "expected"),
    [
        (RANDOM_SEARCH, {}, 500, True),
        ("gepa", {}, 9, True),
        ("simba", {}, 9, False),
        ("bootstrap_fewshot", {}, 9, False),
        ("miprov2", {}, 500, True),
        ("miprov2", {"auto": "light"}, 100, True),
        ("miprov2", {"auto": "light"}, 101, False),
    ],
)
def test_which_optimizers_score_their_result_themselves(name, kwargs, n, expected):
    assert scores_its_result(name, kwargs, n_validation=n) is expected


@pytest.mark.parametrize(
    "name", [RANDOM_SEARCH, "bootstrap_fewshot_optuna", "miprov2", "copro", "infer_rules", "gepa", "better_together"]
)
@pytest.mark.parametrize("budget", [60, 150])
def test_the_result_of_those_that_score_it_themselves_costs_nothing_more(stages, name, budget, monkeypatch):
    spent = []
    adopt = Run.adopt

    def run_optimizer(job):
        found = registry.run_optimizer(job)
        spent.append(job.allowance.scope.charged_calls)
        return found

    def adopted(run, *args, **kwargs):
        spent.append(run.scope.charged_calls)
        adopt(run, *args, **kwargs)

    monkeypatch.setattr(optimizer_step, "run_optimizer", run_optimizer)
    monkeypatch.setattr(Run, "adopt", adopted)
    result = stages.compiled(name, budget=budget).copa_result
    assert len(spent) == 2 or (name, budget) == ("infer_rules", 60)  # whose bootstrapping takes it all
    assert len(set(spent)) == 1
    assert result.charged_calls <= budget
    assert result.score_after >= result.score_before


def test_an_optimizer_that_scored_a_part_of_the_split_leaves_what_scoring_its_result_takes(stages, monkeypatch):
    monkeypatch.setitem(mipro_optimizer_v2.AUTO_RUN_SETTINGS, "light", {"n": 6, "val_size": 6})
    result = stages.compiled("miprov2", budget=130, n_val=12, optimizer_kwargs={"miprov2": {"auto": "light"}})
    assert result.copa_result.score_after > result.copa_result.score_before
    assert result.copa_result.charged_calls <= 130


def test_the_programs_an_optimizer_evaluated_count_as_candidates(toy, monkeypatch):
    runs = []
    baseline = Run.baseline
    monkeypatch.setattr(Run, "baseline", lambda run: runs.append(run) or baseline(run))
    kwargs = {RANDOM_SEARCH: {"num_candidate_programs": 3}}
    result = compiled(toy, RANDOM_SEARCH, budget=400, optimizer_kwargs=kwargs)
    # Besides three with bootstrapped demonstrations: labels, unshuffled ones; the program as written is no candidate.
    assert result.n_trials == 5
    assert runs[0].n_evaluated_elsewhere == 4  # without the result, which has its full score in the run
    assert compiled(toy, "labeled_fewshot", budget=400).n_trials == 1


def test_ensemble_takes_no_share_of_the_budget(toy):
    alone = compiled(toy, "p", budget=300, n_demo_sets=8, patience=None)
    both = compiled(toy, "p -> ensemble", budget=300, n_demo_sets=8, patience=None)
    searched = [next(p for p in one.phases if p.phase in ("p", "1: p")).usage.paid_calls for one in (alone, both)]
    assert searched[1] > 0.75 * searched[0]  # and not half


def test_two_runs_that_the_budget_ends_ask_the_same_whatever_the_timing(toy):
    def asked():
        lm = toy.lm()
        answers = lm.engine._answers

        def slowly(messages, model):
            time.sleep(random.random() / 200)
            return answers(messages, model)

        lm.engine._answers = slowly
        result = compiled(toy, RANDOM_SEARCH, lm=lm, budget=75, optimizer_kwargs={RANDOM_SEARCH: {"max_rounds": 1}})
        return sorted(request.prompt for request in lm.requests), result.charged_calls, result.state

    first = asked()
    assert all(asked() == first for _ in range(2))


# -- one evaluation


class TwoCalls(dspy.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = dspy.Predict("x -> hint"), dspy.Predict("x, hint -> y")

    def forward(self, x):
        return self.second(x=x, hint=self.first(x=x).hint)


ROWS = [dspy.Example(x=str(i), y="b").with_inputs("x") for i in range(6)]


def evaluated(calls, *, second=None, valset=ROWS):
    """(rows answered, threads afterwards, the callback, calls charged) of an evaluation with so many calls left."""
    lm = ScriptedLM(lambda messages: {"hint": "a", "y": "b"})
    program = TwoCalls()
    program.set_lm(lm)
    rows = []
    with open_scope("test", budget=Budget(calls, "few")) as scope:
        allowance = CallBudget(scope, calls)
        seen = Evaluations(
            valset,
            allowance=allowance,
            calls_per_example=2,
            known=frozenset(),
            settings_of=lambda one: Candidate.of(one, lm=lm),
        )
        evaluate = dspy.Evaluate(
            devset=ROWS, metric=lambda e, p, trace=None: rows.append(e.x) or 1.0, num_threads=4, display_progress=False
        )
        with step_scope(allowance, name="step"), dspy.context(lm=lm, callbacks=[seen]):
            try:
                evaluate(program)
                if second is not None:
                    evaluate(second(program))
            except BudgetExhausted:
                pass
        return rows, evaluate.num_threads, seen, scope.charged_calls


def test_an_evaluation_that_cannot_be_paid_is_refused_before_it_starts():
    rows, _, seen, charged = evaluated(5)
    assert (rows, charged, seen.best_first) == ([], 0, ())


def test_an_evaluation_that_perhaps_can_be_paid_is_run_row_by_row():
    rows, _, seen, charged = evaluated(9)
    assert rows == ["0", "1", "2", "3"]
    assert charged <= 9
    assert not seen.best_first


def test_an_evaluation_that_turned_out_cheaper_leaves_the_threads_as_they_were():
    def other(program):
        changed = program.deepcopy()
        changed.second.signature = changed.second.signature.with_instructions("Another one.")
        return changed

    rows, threads, seen, charged = evaluated(18, second=other)  # the first stage is answered already
    assert len(rows) == 12
    assert rows[6:] == ["0", "1", "2", "3", "4", "5"]
    assert (threads, charged, seen.n_complete, seen.covers_all) == (4, 18, 2, True)


def test_a_program_that_was_paid_for_may_be_evaluated_again_when_nothing_is_left():
    rows, _, seen, _ = evaluated(12, second=lambda program: program.deepcopy())
    assert len(rows) == 12
    assert len(seen.best_first) == 1


def test_training_rows_may_be_answered_already_and_are_never_refused():
    rows, _, seen, charged = evaluated(5, valset=[])
    assert rows == ["0", "1"]
    assert charged == 5
    assert not seen.best_first
