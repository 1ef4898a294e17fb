"""Instructions written by a prompt LM: grounded in what is known of the task, or revised after a look at mistakes.

Grounded proposals follow MIPRO (Opsahl-Ong et al. 2024, arXiv 2406.11695): a summary of the data, the program's code,
examples of the step, instructions tried before with their scores, a tip; and the demonstrations that carried weight in
the trials so far. Which grounding, which tip, which temperature and which of the two ways is chosen by the run's
`ProposalBandit`. Proposals are drawn under rollout ids, so they are repeatable.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import dspy
from dspy.utils.exceptions import AdapterParseError, LMConfigurationError, LMError

from copa_harness.evaluate.runner import default_adapter
from copa_harness.lm.call_context import current_scope
from copa_harness.optimize.propose.demos import labelled_demos
from copa_harness.optimize.propose.field_descriptions import (
    DescribeFields,
    counted,
    described_fields,
    descriptions_in,
    with_descriptions,
    without_descriptions,
)
from copa_harness.optimize.propose.render import (
    MAX_SHOWN,
    Failure,
    cleaned,
    data_summary,
    demos_text,
    is_bare,
    other_steps_text,
    program_code,
    spread_out,
    step_text,
)
from copa_harness.optimize.search.candidate import Candidate
from copa_harness.optimize.search.space import InstructionOption
from copa_harness.optimize.search.trial_memory import SearchMemory
from copa_harness.optimize.step_budget import CallBudget
from copa_harness.results import Phase

if TYPE_CHECKING:
    from copa_harness.optimize.search_context import SearchContext

logger = logging.getLogger("copa_harness")

_SHOWN_BY = {
    "data": ("data_summary",),
    "program": ("program_code", "program_description", "other_steps"),
    "examples": ("step_examples",),
    "history": ("past_instructions",),
    "weighty": ("weighty_demonstrations",),
}

TIPS: Mapping[str, str] = {
    "short": "Be plain and short.",
    "criteria": "State the decision criteria that separate the answers, with the numbers or words that matter.",
    "steps": "Describe the task step by step.",
    "pitfalls": "Say what is commonly mistaken, and how to avoid it.",
    "expert": "Give the role of an expert whose knowledge the step needs.",
    "form": "Be precise about the form of the answer.",
    "stakes": "Say what depends on a right answer.",
    "creative": "Try an unusual way to say it.",
}
"""One per proposal: variety without a higher temperature. After MIPRO's."""

TEMPERATURES: tuple[float, ...] = (1.0, 0.7, 1.3)


class DescribeProgram(dspy.Signature):
    """Say in two sentences what task this language-model program solves, and what each of its steps contributes."""

    program_code: str = dspy.InputField()
    program_steps: str = dspy.InputField(desc="name, inputs and outputs of every step")
    program_description: str = dspy.OutputField()


class ProposeInstruction(dspy.Signature):
    """Write one better instruction for a step of a language-model program.

    The instruction is put before the step's input; the step sees its own inputs only. What the whole program answers in
    the end is scored automatically. Say what the step has to do, what decides between the possible answers, and how the
    answer must look. Write general guidance that holds for inputs not seen here, and do not copy single examples.
    """

    program_step: str = dspy.InputField(desc="name, inputs and outputs of the step")
    program_code: str = dspy.InputField()
    program_description: str = dspy.InputField()
    other_steps: str = dspy.InputField(desc="the other steps of the program and what they are told now")
    data_summary: str = dspy.InputField(desc="what the whole program is given and has to answer")
    step_examples: str = dspy.InputField(desc="inputs and right outputs of the step")
    weighty_demonstrations: str = dspy.InputField(
        desc="demonstrations that raised the score most when they were shown: say in words what they teach"
    )
    past_instructions: str = dspy.InputField(
        desc="instructions tried before, with the program's best mean score (0 to 1) under each; do better than them"
    )
    current_instruction: str = dspy.InputField()
    tip: str = dspy.InputField(desc="how to go about it")
    proposed_instruction: str = dspy.OutputField(desc="the instruction alone")


class ReviseInstruction(dspy.Signature):
    """Revise the instruction of a step of a language-model program so that these mistakes are not made again.

    Find out what the mistakes have in common and what the feedback teaches about the task; keep what is right in the
    current instruction; write general guidance, and no answers to single inputs. A step whose own answers are right as
    they are may still tell the steps after it more.
    """

    program_step: str = dspy.InputField(desc="name, inputs and outputs of the step")
    other_steps: str = dspy.InputField(desc="the other steps of the program and what they are told now")
    current_instruction: str = dspy.InputField()
    right_answers: str = dspy.InputField(desc="answers of the step that were right: they must stay so")
    mistakes: str = dspy.InputField(
        desc="what the step was given, what it answered, what the whole program then answered, and the feedback"
    )
    proposed_instruction: str = dspy.OutputField(desc="the revised instruction alone")


class InstructionWriter:
    """Writes instructions for every predictor of one incumbent.

    Args:
        context: The model that writes; examples to summarize and to show; how many proposals and which groundings.
        incumbent: Whose predictors.
        memory: The run's.
        past: Instructions tried before with their mean scores, 0..1, by predictor.
        failures: What the incumbent got wrong, by predictor; without any nothing is revised.
    """

    def __init__(
        self,
        context: SearchContext,
        incumbent: Candidate,
        *,
        memory: SearchMemory,
        past: Mapping[str, Sequence[tuple[str, float]]],
        failures: Mapping[str, Sequence[Failure]],
    ) -> None:
        self.context, self.incumbent, self.settings = context, incumbent, context.settings
        self.memory, self.past, self.failures = memory, past, failures
        self._predictors = dict(incumbent.template.named_predictors())
        self._description: str | None = None

    def write(self, allowance: CallBudget, *, first_rollout: int) -> dict[str, tuple[InstructionOption, ...]]:
        """`n_proposed` instructions per predictor, one call each, as far as the allowance goes.

        Proposals that do not parse, repeat what is known, or are empty are left out. Describing the program for the
        first proposal that shows it costs one more call.

        Args:
            allowance: Asked before every call.
            first_rollout: Rollout id of the first proposal of each predictor; the others follow.

        Raises:
            BudgetExhausted: A ceiling other than that of calls was reached.
        """
        options: dict[str, tuple[InstructionOption, ...]] = {}
        with (
            current_scope().phase(Phase.INSTRUCTIONS),
            dspy.context(lm=self.context.prompt_lm, adapter=default_adapter(), disable_history=True, trace=None),
        ):
            for part in self.incumbent.parts:
                options[part.predictor] = self._for(part.predictor, part.instruction, allowance, first_rollout)
        return options

    def _for(
        self, predictor: str, current: str, allowance: CallBudget, first_rollout: int
    ) -> tuple[InstructionOption, ...]:
        n, bandit, generator = self.settings.n_proposed, self.memory.bandit, self.memory.generator()
        ways = ["written", "reflected"] if self.failures.get(predictor) else ["written"]
        fields_of_answer = described_fields(self._predictors[predictor].signature)
        ways += ["fields"] if fields_of_answer else []
        temperatures = [f"{temperature:g}" for temperature in TEMPERATURES]
        chosen = zip(
            bandit.choose("instruction", ways, n=n, generator=generator),
            bandit.choose("grounding", self.settings.groundings or ("none",), n=n, generator=generator),
            bandit.choose("tip", list(TIPS), n=n, generator=generator),
            bandit.choose("temperature", temperatures, n=n, generator=generator),
            strict=True,
        )
        seen = {text for text, _ in self.past.get(predictor, ())} | {current}
        options: list[InstructionOption] = []
        for i, (way, grounding, tip, temperature) in enumerate(chosen):
            rollout = first_rollout + i
            config = {"rollout_id": rollout, "temperature": float(temperature)}
            arms = [f"instruction: {way}", f"temperature: {temperature}"]
            if way == "reflected":
                text = self._asked(allowance, ReviseInstruction, config, **self._mistakes(predictor, current, i))
            elif way == "fields":
                fields = self._fields(predictor, current, fields_of_answer, i)
                written = descriptions_in(self._asked(allowance, DescribeFields, config, **fields), fields_of_answer)
                text = with_descriptions(current, written)
            else:
                arms += [f"grounding: {grounding}", f"tip: {tip}"]
                fields = self._grounds(predictor, current, grounding, tip, allowance)
                text = self._asked(allowance, ProposeInstruction, config, **fields)
            text = cleaned(text)
            if text and text not in seen:
                seen.add(text)
                options.append(InstructionOption(f"{way} {rollout}", text))
                self.memory.note_instruction(predictor, text, *arms)
        return tuple(options)

    def _asked(self, allowance: CallBudget, signature: Any, config: dict[str, Any], **fields: str) -> str:
        """The last output field of one call that shows the fields given; "" when unusable or not affordable."""
        if not allowance.can_afford(1):
            return ""
        for name in [name for name in signature.input_fields if name not in fields]:
            signature = signature.delete(name)
        try:
            answer = dspy.Predict(signature)(**fields, config=config)
        except LMConfigurationError:
            raise
        except (AdapterParseError, LMError) as error:
            logger.warning("a proposal of the prompt LM is unusable: %s", type(error).__name__)
            return ""
        return str(answer[list(signature.output_fields)[-1]] or "").strip()

    def _step(self, predictor: str) -> str:
        return step_text(predictor, self._predictors[predictor].signature)

    def _others(self, predictor: str) -> dict[str, str]:
        """The other steps, where there are any."""
        signatures = {name: one.signature for name, one in self._predictors.items()}
        text = other_steps_text(predictor, signatures, {p.predictor: p.instruction for p in self.incumbent.parts})
        return {"other_steps": text} if text else {}

    def _demos(self, predictor: str) -> list[tuple[dspy.Example, str]]:
        """Demonstrations of a step: labelled rows, or where the data have none, what was bootstrapped for it so far."""
        return labelled_demos(self._predictors[predictor].signature, self.context.trainset) or [
            (demo, "") for demo in self.memory.demos_of(predictor)
        ]

    def _examples(self, predictor: str, n: int) -> str:
        """The incumbent's own demonstrations, else some of the others, one line each; "" without any."""
        own = next(part.demos for part in self.incumbent.parts if part.predictor == predictor)
        return demos_text(own[:n] or spread_out(self._demos(predictor), n), self._predictors[predictor].signature)

    def _mistakes(self, predictor: str, current: str, turn: int) -> dict[str, str]:
        """A window of the mistakes, moved on with every proposal: different mistakes teach different things."""
        failures = list(self.failures[predictor])
        start = turn * MAX_SHOWN % len(failures)
        shown = [*failures[start:], *failures[:start]][:MAX_SHOWN]
        fields = {"program_step": self._step(predictor), **self._others(predictor), "current_instruction": current}
        if right := self._examples(predictor, 3):
            fields["right_answers"] = right
        return {**fields, "mistakes": "\n\n".join(failure.text for failure in shown)}

    def _fields(self, predictor: str, current: str, known: Mapping[str, str], turn: int) -> dict[str, str]:
        """The fields of `DescribeFields` that have something to say."""
        known = {**known, **counted(self._predictors[predictor].signature, self.context.trainset)}
        known |= descriptions_in(current, known)
        fields = {
            "program_step": self._step(predictor),
            "current_instruction": without_descriptions(current),
            "record_fields": "\n".join(f"{path}: {text}" for path, text in known.items()),
        }
        if examples := self._examples(predictor, 3):
            fields["step_examples"] = examples
        if self.failures.get(predictor):
            fields["mistakes"] = self._mistakes(predictor, current, turn)["mistakes"]
        return fields

    def _grounds(self, predictor: str, current: str, grounding: str, tip: str, allowance: CallBudget) -> dict[str, str]:
        """The fields of `ProposeInstruction` that a grounding shows and that have something to say."""
        shown = [name for key, names in _SHOWN_BY.items() if grounding in ("all", key) for name in names]
        fields = {"program_step": self._step(predictor), "current_instruction": current, "tip": TIPS[tip]}
        if "data_summary" in shown and self.context.trainset:
            fields["data_summary"] = data_summary(self.context.trainset)
        if "program_code" in shown:
            fields["program_code"] = program_code(self.incumbent.template)
            fields |= self._others(predictor)
            if description := self._described(allowance):
                fields["program_description"] = description
        if "step_examples" in shown and (examples := self._examples(predictor, 4)):
            fields["step_examples"] = examples
        if "weighty_demonstrations" in shown:
            known = [*(demo for demo, _ in self._demos(predictor)), *self.memory.demos_of(predictor)]
            if helpful := self.memory.helpful_demos(predictor, known):
                fields["weighty_demonstrations"] = demos_text(helpful, self._predictors[predictor].signature)
        if "past_instructions" in shown and (past := self.past.get(predictor)):
            best_last = sorted(past, key=lambda one: one[1])[-8:]
            fields["past_instructions"] = "\n".join(f"{score:.2f}: {text}" for text, score in best_last)
        return fields

    def _described(self, allowance: CallBudget) -> str:
        """The program in the prompt LM's words, asked for once; "" for a bare predictor, whose step says it all."""
        if is_bare(self.incumbent.template):
            return ""
        if self._description is None:
            steps = "\n".join(self._step(name) for name in self._predictors)
            fields = {"program_code": program_code(self.incumbent.template), "program_steps": steps}
            self._description = self._asked(allowance, DescribeProgram, {}, **fields)
        return self._description
