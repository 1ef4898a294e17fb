"""BootstrapFewShotWithOptuna with a seed, and for predictors that nothing was bootstrapped for.

DSPy's own draws from Optuna without a seed, so no two runs agree, and fails on a predictor without demonstrations to
choose from (``low=0 high=-1``). Knows Optuna and DSPy's class; knows nothing of sizes or budgets.
"""

from __future__ import annotations

from typing import Any

import dspy
import optuna
from dspy import teleprompt


class SeededDemoStudy(teleprompt.BootstrapFewShotWithOptuna):
    """As DSPy's: every trial shows each predictor one of the demonstrations that BootstrapFewShot made.

    Attributes:
        seed: Of the sampler.
    """

    seed = 0

    def objective(self, trial: optuna.Trial) -> float:
        """The mean score, 0..100, of one choice of demonstrations."""
        program = self.student.reset_copy()
        pairs = zip(self.compiled_teleprompter.named_predictors(), program.predictors(), strict=True)
        for (name, compiled), predictor in pairs:
            if compiled.demos:
                chosen = trial.suggest_int(f"demo_index_for_{name}", 0, len(compiled.demos) - 1)
                predictor.demos = [dict(compiled.demos[chosen])]
        evaluate = dspy.Evaluate(
            devset=self.valset, metric=self.metric, num_threads=self.num_threads, display_table=False,
            display_progress=False,
        )  # fmt: skip
        score = float(evaluate(program).score)
        trial.set_user_attr("program", program)
        return score

    def compile(
        self,
        student: dspy.Module,
        *,
        teacher: dspy.Module | None = None,
        max_demos: int,
        trainset: list[dspy.Example],
        valset: list[dspy.Example] | None = None,
    ) -> dspy.Module:
        """The best of `num_candidate_programs` choices."""
        self.trainset, self.valset = trainset, valset or trainset
        self.student = student.reset_copy()
        self.teacher = teacher.deepcopy() if teacher is not None else student.reset_copy()
        bootstrap = teleprompt.BootstrapFewShot(
            metric=self.metric, max_bootstrapped_demos=max_demos, max_labeled_demos=self.max_labeled_demos,
            teacher_settings=self.teacher_settings, max_rounds=self.max_rounds,
        )  # fmt: skip
        self.compiled_teleprompter = bootstrap.compile(self.student, teacher=self.teacher, trainset=self.trainset)
        study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=self.seed))
        study.optimize(self.objective, n_trials=self.num_candidate_sets)
        best: Any = study.best_trial.user_attrs["program"]
        assert isinstance(best, dspy.Module)
        return best
