"""What changed forms of the test examples are answered: the measurement behind the gate `max_violation_rate`.

Only examples that are right as given are asked again, each in every form (`robustness.perturbations`) that changes
something. Of the first form that breaks an answer the smallest part that still does is searched for
(`robustness.strategies.smallest`), which takes a few calls more. It is done once for a run, when a gate asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from copa_harness.results import ExampleResult, Phase, PhaseRecord
from copa_harness.session.evaluation import groups_of, split_of
from copa_harness.session.options import Settings

if TYPE_CHECKING:
    import dspy

    from copa_harness.judge.violations import FormAnswer, FormOutcome, Violations
    from copa_harness.lm.metered import MeteredLM
    from copa_harness.robustness.perturbations import Form, Forms, Step
    from copa_harness.tasks.task import Task

_OTHER_SEED = 500
"""Added to the run's seed: a robust search must not be judged on the very orders of fields it has seen."""


def perturbations_of(settings: Settings) -> tuple[str, ...]:
    """Their names, as the marker gives them."""
    from copa_harness.optimize.options import SearchOptions
    from copa_harness.option_fields import options_of

    return tuple(settings.search.get("perturbations", options_of(SearchOptions)["perturbations"].default))


def forms_of(settings: Settings, prompt_lm: Any) -> Forms:
    """The forms in which a run's test examples are asked again.

    Raises:
        ConfigurationError: A paraphrase is wanted, and no model is there to write it.
    """
    from copa_harness.robustness.perturbations import Forms

    return Forms(perturbations_of(settings), settings.seed + _OTHER_SEED, prompt_lm)


@dataclass(slots=True)
class FormMeter:
    """Measures the changed forms of one run, once.

    Attributes:
        task: Where examples and metric come from.
        program: The program.
        lm: Its model.
        before: What it answered to the examples as given.
        settings: In force for the run.
        prompt_lm: Writes paraphrases.
        phases: What it cost so far.
    """

    task: Task
    program: dspy.Module
    lm: MeteredLM
    before: Sequence[ExampleResult]
    settings: Settings
    prompt_lm: Any
    phases: tuple[PhaseRecord, ...] = ()
    _found: Violations | None = field(default=None, init=False)

    def measured(self) -> Violations:
        """The answers to the changed forms.

        Raises:
            BudgetExhausted: The ceilings of the whole session refuse a call.
        """
        if self._found is None:
            from copa_harness.lm.call_context import in_context, open_scope

            what = "changed forms"
            with (
                open_scope(f"{self.task.name}: {what}") as scope,
                scope.phase(Phase.EVALUATE),
                in_context(json_fallback=self.settings.json_fallback),
            ):
                self._found = self._measure()
            self.phases = (PhaseRecord(what, scope.usage()),)
        return self._found

    def _measure(self) -> Violations:
        from copa_harness.evaluate.examples import example_ids
        from copa_harness.judge.violations import BROKEN, Violations

        passed = self.settings.search.get("pass_score", 1.0)
        right = {row.example_id for row in self.before if row.score is not None and row.score >= passed}
        examples = split_of(self.task, "test")
        asked = {name: one for name, one in zip(example_ids(examples), examples, strict=True) if name in right}
        forms = forms_of(self.settings, self.prompt_lm)
        answers: list[FormAnswer] = []
        smallest = ""
        for form in forms.of(self.program, list(asked.values())) if asked else ():
            named = {i: list(asked)[i] for i in form.rows}
            found = self._answers(form.program, form.rows, named, form.name, passed)
            if not smallest and (first := next((i for i in found if found[i].outcome in BROKEN), None)) is not None:
                smallest = self._shrunk(form, list(asked.values())[first], first, found[first], passed)
            answers += found.values()
        return Violations(tuple(answers), forms.labels, len(asked), groups_of(self.task), smallest)

    def _answers(self, program: dspy.Module, rows: Any, names: Any, form: str, passed: float) -> dict[int, FormAnswer]:
        from copa_harness.evaluate.runner import run_examples
        from copa_harness.judge.violations import FormAnswer

        runs = run_examples(
            program,
            list(rows.values()),
            metric=self.task.metric,
            split="test",
            lm=self.lm,
            threads=self.settings.threads,
            ids=[names[i] for i in rows],
        )
        return {i: FormAnswer(names[i], form, *_outcome(run.result, passed)) for i, run in zip(rows, runs, strict=True)}

    def _shrunk(self, form: Form, example: dspy.Example, row: int, answer: FormAnswer, passed: float) -> str:
        """The smallest part of a change that breaks an answer, in words."""
        from copa_harness.judge.violations import BROKEN
        from copa_harness.robustness.perturbations import changed_example, changed_program
        from copa_harness.robustness.strategies import smallest

        said = {form.steps[row]: answer}

        def is_broken(part: tuple[Step, ...]) -> bool:
            program, changed = changed_program(self.program, part), changed_example(example, part)
            said[part] = self._answers(program, {0: changed}, {0: answer.example_id}, form.name, passed)[0]
            return said[part].outcome in BROKEN

        steps = smallest(form.steps[row], is_broken, seed=self.settings.seed)
        n_steps = f" ({len(steps)} of {len(form.steps[row])} changes)" if len(form.steps[row]) > 1 else ""
        told = "; ".join(map(str, steps[:6])) + ("; ..." if len(steps) > 6 else "")
        return f"{answer.example_id}, {form.name}{n_steps}: {told}; {said[steps].said}"


def _outcome(result: ExampleResult, passed: float) -> tuple[FormOutcome, str]:
    from copa_harness.judge.explanations import shortened

    if result.score is None:
        return "no answer", result.error or ""
    if result.outcome == "unparsed":
        return "unparsed", f"the answer does not parse: {shortened(result.answer or result.error or '')}"
    return ("held" if result.score >= passed else "wrong"), f"answered {shortened(str(result.predicted))}"
