"""Changes that should not change an answer, of an example's inputs and of a program's prompts.

A perturbation is a pure function of a value and a seed, and gives *steps*: small changes, any subset of which can be
made by itself. So a change that breaks a program can be shrunk (see `strategies`) and told in words.

| name | what it changes |
|---|---|
| `case` | the case of all words of a text input: upper, lower or capitalized |
| `white_space` | gaps between words, and blanks in front and behind, of a text input |
| `typos` | about one in eight of the longer words of a text input: two letters exchanged, one left out, one doubled |
| `distractor` | a sentence that has nothing to do with it, in a text input of at least four words |
| `paraphrase` | a text input of at least four words, said in other words by the prompt model |
| `instruction_case`, ... | the first four, of every predictor's instruction |
| `field_order` | the order of a predictor's input fields |
| `option_order` | the order of the values of `Literal` outputs, and of the items of inputs that are lists |
| `demo_order` | the order of a predictor's demonstrations |

What has nothing to change is left as it is. At import this is standard library only: options are checked by `NAMES`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from copa_harness.errors import ConfigurationError, did_you_mean

if TYPE_CHECKING:
    import dspy

MIN_WORDS = 4
"""Shorter texts are names and numbers: nothing is put beside them, and they are not said in other words."""

DISTRACTORS = (
    "The weather was fine that day.",
    "By the way, the office moves next month.",
    "A cat sat on the window sill.",
    "This was written on a Tuesday.",
    "The coffee had gone cold by then.",
    "My brother plays the piano.",
)


# -- steps


@dataclass(frozen=True, slots=True)
class Edit:
    """In a text: `old` at `start` becomes `new`. The edits of one text do not overlap."""

    start: int
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.old!r} -> {self.new!r}" if self.old else f"{self.new!r} put in at {self.start}"


@dataclass(frozen=True, slots=True)
class Swap:
    """In a sequence: two positions exchanged. Swaps are made one after the other."""

    i: int
    j: int

    def __str__(self) -> str:
        return f"{self.i + 1} and {self.j + 1} exchanged"


@dataclass(frozen=True, slots=True)
class Step:
    """One change and where: `("input", field)`, `("items", field)`, or of a predictor `("instruction", predictor)`,
    `("fields", predictor)`, `("demos", predictor)`, `("options", predictor, field)`.
    """

    place: tuple[str, ...]
    change: Edit | Swap

    def __str__(self) -> str:
        return f"{' '.join(self.place)}: {self.change}"


IN_EXAMPLE = ("input", "items")


def edited(text: str, edits: Iterable[Edit]) -> str:
    """The text with some of its edits made."""
    for edit in sorted(edits, key=lambda one: -one.start):
        text = text[: edit.start] + edit.new + text[edit.start + len(edit.old) :]
    return text


def swapped(values: Sequence[Any], swaps: Iterable[Swap]) -> list[Any]:
    """The values in another order."""
    order = list(values)
    for swap in swaps:
        order[swap.i], order[swap.j] = order[swap.j], order[swap.i]
    return order


# -- what a text or an order can become


def case(text: str, seed: int) -> tuple[Edit, ...]:
    """All words in upper case, in lower case or capitalized; the seed says which comes first into question."""
    styles = (str.upper, str.lower, str.capitalize)
    words = list(re.finditer(r"[^\W\d_]\w*", text))
    for turn in range(len(styles)):
        style = styles[(seed + turn) % len(styles)]
        if edits := tuple(Edit(m.start(), m[0], style(m[0])) for m in words if style(m[0]) != m[0]):
            return edits
    return ()


def white_space(text: str, seed: int) -> tuple[Edit, ...]:
    """Every gap between words another one, a blank in front and behind."""
    if not text:
        return ()
    rng = _rng("white_space", text, seed)
    gaps = [Edit(m.start(), m[0], rng.choice([g for g in ("  ", "   ", "\n", "\t") if g != m[0]])) for m in _gaps(text)]
    return (Edit(0, "", " "), *gaps, Edit(len(text), "", rng.choice((" ", "  ", "\n"))))


def typos(text: str, seed: int) -> tuple[Edit, ...]:
    """A slip in one in eight of the words of four letters and more, in one at least."""
    rng = _rng("typos", text, seed)
    words = list(re.finditer(r"[^\W\d_]{4,}", text))
    slips = []
    for word in sorted(rng.sample(words, k=-(-len(words) // 8)), key=lambda m: m.start()):
        i, letters = rng.randrange(1, len(word[0]) - 2), word[0]
        a, b = letters[i], letters[i + 1]
        new = rng.choice(("", a + a, b + a) if a != b else ("", a + a))  # left out, doubled, exchanged
        old = a + b if len(new) == 2 and new != a + a else a
        slips.append(Edit(word.start() + i, old, new))
    return tuple(slips)


def distractor(text: str, seed: int) -> tuple[Edit, ...]:
    """A sentence of no matter in front, behind, or between two sentences."""
    if len(text.split()) < MIN_WORDS:
        return ()
    rng = _rng("distractor", text, seed)
    sentence = rng.choice(DISTRACTORS)
    place = rng.choice([0, len(text), *(m.end() for m in re.finditer(r"[.!?]\s+", text))])
    return (Edit(place, "", f" {sentence}" if place == len(text) else f"{sentence} "),)


def shuffled(n: int, seed: int) -> tuple[Swap, ...]:
    """Another order of `n` things (Fisher and Yates), never the one there is."""
    rng = Random(f"order {n} {seed}")
    while n > 1:
        swaps = tuple(Swap(i, j) for i in range(n - 1) if (j := rng.randrange(i, n)) != i)
        if swapped(range(n), swaps) != list(range(n)):
            return swaps
    return ()


def _gaps(text: str) -> Iterator[re.Match[str]]:
    return re.finditer(r"(?<=\S)\s+(?=\S)", text)


def _rng(name: str, text: str, seed: int) -> Random:
    return Random(f"{name} {seed} {text}")  # the same in every process: a text is hashed by SHA-512


OF_TEXT: Mapping[str, Callable[[str, int], tuple[Edit, ...]]] = {
    "case": case,
    "white_space": white_space,
    "typos": typos,
    "distractor": distractor,
}

OF_INSTRUCTION = "instruction_"

PARAPHRASE = "paraphrase"

NAMES = (
    *OF_TEXT,
    PARAPHRASE,
    *(OF_INSTRUCTION + name for name in OF_TEXT),
    "field_order",
    "option_order",
    "demo_order",
)
"""What perturbations may be called."""


def check_names(names: Any) -> None:
    """Raise `ConfigurationError` unless these are perturbations; one named twice gives two forms of every row."""
    listed = list(names) if isinstance(names, Sequence) and not isinstance(names, str) else []
    unknown = [name for name in listed if name not in NAMES]
    if not listed or unknown:
        raise ConfigurationError(
            f"got perturbations={names!r}; expected a list of one or more of {', '.join(NAMES)}"
            f"{did_you_mean(str(unknown[0]), NAMES) if unknown else ''}"
        )


# -- of examples and programs


def steps_in_example(name: str, example: dspy.Example, seed: int) -> tuple[Step, ...]:
    """What a perturbation changes in an example's inputs; `paraphrase` needs a model, see `Forms`."""
    inputs = example.inputs().toDict()
    if name in OF_TEXT:
        texts = {key: value for key, value in inputs.items() if isinstance(value, str)}
        return tuple(Step(("input", key), edit) for key, text in texts.items() for edit in OF_TEXT[name](text, seed))
    if name == "option_order":
        lists = {key: value for key, value in inputs.items() if isinstance(value, (list, tuple))}
        return tuple(Step(("items", key), one) for key, value in lists.items() for one in shuffled(len(value), seed))
    return ()


def steps_in_program(name: str, program: dspy.Module, seed: int) -> tuple[Step, ...]:
    """What a perturbation changes in a program's prompts."""
    steps: list[Step] = []
    for predictor, one in program.named_predictors():
        if name.startswith(OF_INSTRUCTION):
            edits = OF_TEXT[name.removeprefix(OF_INSTRUCTION)](one.signature.instructions, seed)
            steps += [Step(("instruction", predictor), edit) for edit in edits]
        elif name == "field_order":
            steps += [Step(("fields", predictor), swap) for swap in shuffled(len(one.signature.input_fields), seed)]
        elif name == "demo_order":
            steps += [Step(("demos", predictor), swap) for swap in shuffled(len(one.demos), seed)]
        elif name == "option_order":
            for key, info in one.signature.output_fields.items():
                n_options = len(get_args(info.annotation)) if get_origin(info.annotation) is Literal else 0
                steps += [Step(("options", predictor, key), swap) for swap in shuffled(n_options, seed)]
    return tuple(steps)


def changed_example(example: dspy.Example, steps: Iterable[Step]) -> dspy.Example:
    """A copy of the example with those of the steps made that are an example's."""
    changed = example.copy()
    for (kind, *rest), changes in _by_place(steps).items():
        if kind in IN_EXAMPLE:
            value = example[rest[0]]
            changed[rest[0]] = edited(value, changes) if kind == "input" else type(value)(swapped(value, changes))
    return changed


def changed_program(program: dspy.Module, steps: Iterable[Step]) -> dspy.Module:
    """A copy of the program with those of the steps made that are a program's; the program itself without any."""
    places = {place: changes for place, changes in _by_place(steps).items() if place[0] not in IN_EXAMPLE}
    if not places:
        return program
    changed = program.deepcopy()
    predictors = dict(changed.named_predictors())
    for (kind, name, *rest), changes in places.items():
        one = predictors[name]
        if kind == "instruction":
            one.signature = one.signature.with_instructions(edited(one.signature.instructions, changes))
        elif kind == "demos":
            one.demos = swapped(one.demos, changes)
        elif kind == "options":
            options = tuple(swapped(get_args(one.signature.fields[rest[0]].annotation), changes))
            one.signature = one.signature.with_updated_fields(rest[0], type_=Literal[options])
        else:
            for key, info in swapped(list(one.signature.input_fields.items()), changes):
                one.signature = one.signature.delete(key).append(key, info, type_=info.annotation)
    return changed


def _by_place(steps: Iterable[Step]) -> dict[tuple[str, ...], list[Any]]:
    found: dict[tuple[str, ...], list[Any]] = {}
    for step in steps:
        found.setdefault(step.place, []).append(step.change)
    return found


# -- the fixed forms of a run's rows


@dataclass(frozen=True, slots=True)
class Form:
    """One way in which all rows are asked again.

    Attributes:
        name: The perturbation; with a number from the second of that name on.
        program: The program to ask.
        rows: What to ask it, by position, of those rows that are asked differently.
        steps: What was changed, by position.
    """

    name: str
    program: dspy.Module
    rows: Mapping[int, dspy.Example]
    steps: Mapping[int, tuple[Step, ...]]


@dataclass(frozen=True, slots=True)
class Forms:
    """The perturbations of a run: the same names and seed change the same rows in the same way.

    Raises:
        ConfigurationError: No such perturbation, or a paraphrase and nobody to write it.
    """

    names: tuple[str, ...]
    seed: int
    prompt_lm: Any = field(default=None, repr=False)

    def __post_init__(self) -> None:
        check_names(self.names)
        if PARAPHRASE in self.names and self.prompt_lm is None:
            raise ConfigurationError(
                f"got the perturbation {PARAPHRASE!r} and no model to write it; remedy: name one with --copa-prompt-lm"
            )

    @property
    def labels(self) -> tuple[str, ...]:
        """The names, those given again with a number."""
        counts = [self.names[:i].count(name) for i, name in enumerate(self.names)]
        return tuple(f"{name} {n + 1}" if n else name for name, n in zip(self.names, counts, strict=True))

    def of(self, program: dspy.Module, examples: Sequence[dspy.Example]) -> Iterator[Form]:
        """Every form of a program's rows; a form that changes none of them is left out."""
        for i, (name, label) in enumerate(zip(self.names, self.labels, strict=True)):
            seed = 1000 * self.seed + i
            in_program = steps_in_program(name, program, seed)
            steps = {row: (*in_program, *self._in_example(name, one, seed)) for row, one in enumerate(examples)}
            steps = {row: made for row, made in steps.items() if made}
            if steps:
                rows = {row: changed_example(examples[row], made) for row, made in steps.items()}
                yield Form(label, changed_program(program, in_program), rows, steps)

    def _in_example(self, name: str, example: dspy.Example, seed: int) -> tuple[Step, ...]:
        if name != PARAPHRASE:
            return steps_in_example(name, example, seed)
        texts = {key: value for key, value in example.inputs().toDict().items() if isinstance(value, str)}
        said = {key: self._paraphrase(text, seed) for key, text in texts.items() if len(text.split()) >= MIN_WORDS}
        return tuple(Step(("input", key), Edit(0, texts[key], new)) for key, new in said.items() if new != texts[key])

    def _paraphrase(self, text: str, seed: int) -> str:
        """The text in other words; as it is, where the answer does not parse."""
        import dspy
        from dspy.utils.exceptions import AdapterParseError

        signature = dspy.Signature(
            "text -> paraphrase", "Say the text in other words. Keep names and numbers as they are."
        )
        try:
            once = dspy.settings.adapter or dspy.ChatAdapter(use_json_adapter_fallback=False)
            with dspy.context(lm=self.prompt_lm, adapter=once, trace=None):
                said = dspy.Predict(signature)(text=text, config={"rollout_id": seed + 1, "temperature": 1.0})
        except AdapterParseError:
            return text
        return str(said.paraphrase).strip() or text
