"""One synthetic in-context classification episode: its world, its words and the texts of its turns.

An episode is one system message and turns that are each a demonstration for the later ones and a query itself. Its text
is that of ``template``; its task is one of ``worlds``, as are its names and labels, unless these are random vocabulary
pieces. One of its outputs is the main one, which the world decides; further ones are functions of the same example.
Symbols: P recorded turns, S feature slots, C clauses.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from copa_harness.lm.embedded.pretrain import template, worlds
from copa_harness.lm.embedded.pretrain.template import Field
from copa_harness.lm.embedded.pretrain.tokenizer import ASSISTANT, END, FORMAT_RANGE, FORMATS, USER, print_number
from copa_harness.lm.embedded.pretrain.worlds import any_name, any_word, field_names, label_words, labels_of_one_start

N_TURNS, N_SLOTS, N_CLAUSES = 24, 5, 3
_Value = tuple[int, int, int]
"""Characters: start and end of a field name, start of its value."""
KINDS = ("gauss", "linear", "axis", "rule", "text")
_PLAIN_OUTPUTS = ("label", "category", "class", "type", "group", "species", "result", "output")
_SINGLE_INPUTS = (*["features"] * 6, "record", "input", "text", "sample", "values", "data")
_TEXT_INPUTS = ("text", "message", "question", "sentence", "review", "note", "input", "comment")


class Span(NamedTuple):
    """Part of an answer and how much its tokens weigh.

    Attributes:
        start, end: Characters in the turn's text.
        first, later: Weights of the first token and of the others; 0 for format tokens, which the row weighs.
        output: Index of the output field whose value this is, None elsewhere.
        naming: Whether it is an output field's name.
    """

    start: int
    end: int
    first: float = 0.0
    later: float = 0.0
    output: int | None = None
    naming: bool = False


class Turn(NamedTuple):
    """One turn's text and what stands where in it, in characters.

    Attributes:
        text: The user's and the assistant's message.
        values: Places of the feature values and their names.
        label_at: Where the main label begins.
        spans: The answer's parts and their weights.
        sentence: Start and end of the deciding sentence, equal where there is none.
    """

    text: str
    values: list[_Value]
    label_at: int
    spans: list[Span]
    sentence: tuple[int, int]


@dataclass(frozen=True, slots=True)
class Mix:
    """What a stage's episodes are made of; probabilities unless said otherwise.

    Attributes:
        kinds: Weights of ``KINDS``.
        n_features: Weights of 1..5 features.
        n_classes: Weights of 2, 3, 4 ... 8 classes (at most 4 where a threshold rule decides).
        formats: Weights of ``tokenizer.FORMATS``.
        several_fields: Share of episodes with one input field per feature.
        single_styles: Weights of "5.1 3.5", "5.1, 3.5", "a=5.1, b=3.5", "a 5.1, b 3.5", "a: 5.1, b: 3.5".
        spreads: Standard deviations of the Gaussian classes as shares of the range, drawn uniformly.
        system: Share of episodes that have a system message at all.
        request: Share of demonstrations' turns that nevertheless carry the closing request.
        piece_labels: Share of episodes whose labels are random vocabulary pieces.
        literal: Share of ``Literal`` outputs among the ``str`` ones.
        reasoning: Share of episodes with a reasoning field.
        stretch: Share of rows whose positions skip ahead between turns, so that long prompts are not new.
        plain_answer: Share of episodes whose output field is called ``answer``.
        any_output: Share of the other episodes whose output fields have any names at all.
        same_start: Share of episodes whose labels all begin with the same vocabulary piece.
        n_outputs: Weights of 1, 2, 3 output fields.
        output_kinds: Weights of ``str``, ``bool`` and ``int`` outputs.
        any_inputs: Share of episodes whose input fields have any names, types mixed, some with descriptions.
        extra_inputs: Share of episodes with one to three input fields that say nothing.
        name_weight: Loss weight of an output's name in a first turn; a quarter of it later.
        later_weight: Of a value's tokens after the first.
        next_weight: Of what follows a value: the next output's marker, or the end.
        thought_weight: Of how a reasoning begins; 0 is a format token's.
        vague: Share of the outputs whose description says what the value means and not what it may be.
    """

    kinds: tuple[float, ...]
    n_features: tuple[float, ...]
    n_classes: tuple[float, ...] = (1.0, 1.6, 0.3)
    formats: tuple[float, ...] = (6.0, 2.0, 0.4, 0.7, 0.8, 0.8, 0.8)
    several_fields: float = 0.5
    single_styles: tuple[float, ...] = (2.0, 1.0, 5.0, 1.0, 1.0)
    spreads: tuple[float, float] = (0.03, 0.1)
    system: float = 1.0
    request: float = 0.3
    piece_labels: float = 0.7
    literal: float = 0.15
    reasoning: float = 0.03
    stretch: float = 0.0
    plain_answer: float = 0.85
    any_output: float = 0.0
    same_start: float = 0.0
    n_outputs: tuple[float, ...] = (1.0,)
    output_kinds: tuple[float, ...] = (1.0, 0.0, 0.0)
    any_inputs: float = 0.0
    extra_inputs: float = 0.0
    name_weight: float = 0.3
    later_weight: float = 0.3
    next_weight: float = 0.1
    thought_weight: float = 0.0
    vague: float = 0.0


class Episode:
    """One drawn episode: its world, its words and the texts of its turns.

    Attributes:
        outputs: (turns, fields) the output values, as printed.
        main: Index of the main output among the shape's.
        listed: Per output field, whether the prompt says its values.
    """

    def __init__(
        self, mix: Mix, rng: random.Random, numpy_rng: np.random.Generator, pieces: list[str], *, n_turns: int
    ) -> None:
        self._rng, self._n_turns, self._pieces = rng, n_turns, pieces
        self.kind = rng.choices(range(len(mix.kinds)), mix.kinds)[0]
        kind = KINDS[self.kind]
        self.n_features = 0 if kind == "text" else rng.choices(range(1, 6), mix.n_features)[0]
        n_classes = rng.choices(range(2, 2 + len(mix.n_classes)), mix.n_classes)[0]
        if kind in ("axis", "rule"):
            n_classes = min(n_classes, N_CLAUSES + 1)
        self._main_kind = rng.choices(("str", "bool", "int"), mix.output_kinds)[0]
        if self._main_kind == "bool":
            n_classes = 2
        several = kind != "text" and rng.random() < mix.several_fields
        self._style = rng.choices(range(5), mix.single_styles)[0]
        if kind == "rule" and self._style < 2:
            self._style = 2
        self._any_inputs = rng.random() < mix.any_inputs
        self.names = self._feature_names(several)
        self.same_start = self._main_kind == "str" and mix.same_start > 0 and rng.random() < mix.same_start
        self.labels = self._values(self._main_kind, n_classes, mix, same_start=self.same_start)
        self._formats = rng.choices(FORMATS, mix.formats, k=1) * self.n_features
        if rng.random() < 0.25:
            self._formats = rng.choices(FORMATS, mix.formats, k=self.n_features)
        width = np.where(
            numpy_rng.random(self.n_features) < 0.5,
            numpy_rng.uniform(0.7, 1, self.n_features),
            numpy_rng.uniform(0.2, 1, self.n_features),
        )
        width = np.maximum(width, [0.7 if fmt == "d" else 0.0 for fmt in self._formats])
        low = numpy_rng.random(self.n_features) * (1 - width)
        self.clauses: list[worlds.Clause] = []
        self.last = 0
        self._sentences: list[str] = []
        self.key_words: list[frozenset[str]] = []
        if kind == "text":
            self._sentences, self.key_words, self.classes = worlds.text_world(rng, n_classes, n_examples=n_turns)
            self.printed: list[list[str]] = [[] for _ in range(n_turns)]
        else:
            shares = low + width * np.clip(self._draw(kind, n_classes, mix, numpy_rng, low, width), 0, 1)
            self.printed = [[print_number(v, f) for v, f in zip(row, self._formats, strict=True)] for row in shares]
        if self.clauses:
            self.classes = np.array([self._decide(row)[1] for row in self.printed])
        self.field_places: list[int] = []
        self.threshold_places: list[int] = []
        self.label_places: list[int] = []
        self.outputs: list[tuple[str, ...]] = []
        self._extra_values: dict[str, list[str]] = {}
        self.shape, self.instruction = self._signature(several, kind, mix, numpy_rng)
        if kind != "rule":
            self.clauses = []

    def _feature_names(self, several: bool) -> list[str]:
        rng = self._rng
        if not self._any_inputs or rng.random() < 0.4:
            return field_names(rng, self.n_features, joined=several or rng.random() < 0.6)
        names: list[str] = []
        while len(names) < self.n_features:
            name = any_name(rng, self._pieces)
            if name not in names:
                names.append(name)
        return names

    def _values(self, kind: str, n: int, mix: Mix, *, same_start: bool = False) -> list[str]:
        """The printed values of an output field of this kind."""
        rng = self._rng
        if kind == "bool":
            return rng.sample(["True", "False"], 2)
        if kind == "int":
            start = rng.choice([0, 1, 1])
            values = (
                [str(start + i) for i in range(n)] if rng.random() < 0.6 else list(map(str, rng.sample(range(10), n)))
            )
            return values if rng.random() < 0.4 else rng.sample(values, n)
        if same_start:
            return labels_of_one_start(rng, n, self._pieces)
        return label_words(rng, n, self._pieces if rng.random() < mix.piece_labels else None)

    def _draw(
        self, kind: str, n_classes: int, mix: Mix, rng: np.random.Generator, low: worlds.Shares, width: worlds.Shares
    ) -> worlds.Shares:
        n = self._n_turns
        if kind == "gauss":
            spread = float(rng.uniform(*mix.spreads))
            shares, self.classes = worlds.gaussian_world(rng, self.n_features, n_classes, spread=spread, n_examples=n)
            return shares
        if kind == "linear":
            shares, self.classes = worlds.linear_world(rng, self.n_features, n_classes, n_examples=n)
            return shares
        rule = worlds.rule_shape(rng, self.n_features, n_classes)
        for feature, operator, threshold, label in rule:
            printed = print_number(low[feature] + width[feature] * threshold, self._formats[feature])
            self.clauses.append(worlds.Clause(feature, operator, printed, label))
        self.last = next(iter(set(range(n_classes)) - {clause.label for clause in self.clauses}))
        return worlds.rule_shares(rng, rule, self.n_features, n_examples=n)

    def _decide(self, printed: list[str]) -> tuple[int, int]:
        """Index of the clause that fires (or of the last label) and its class."""
        for i, clause in enumerate(self.clauses):
            if clause.holds(printed[clause.feature]):
                return i, clause.label
        return len(self.clauses), self.last

    def _signature(
        self, several: bool, kind: str, mix: Mix, numpy_rng: np.random.Generator
    ) -> tuple[template.Shape, str]:
        rng = self._rng
        inputs = self._inputs(several, kind, mix)
        outputs, label_list, described = self._outputs(inputs, mix)
        shown = "`" + "`, `".join(field.name for field in inputs) + "`"
        asked = "`" + "`, `".join(field.name for field in outputs) + "`"
        output = outputs[self.main].name
        instruction = rng.choice(
            [
                "Classify the record.",
                "Classify the record.",
                f"Predict the {output}.",
                "Assign each record to a group.",
                f"Determine the {output} from the {rng.choice(['fields', 'values', 'features'])}.",
                f"Given the fields {shown}, produce the fields {asked}.",
                f"Given the {' and '.join(self.names[:2]) or inputs[0].name}, predict the {any_word(rng)} {output}.",
                f"Classify the {any_word(rng)}.",
                f"Decide which {any_word(rng)} it is.",
            ]
        )
        if mix.any_inputs and rng.random() < 0.2:
            words = " ".join(worlds.text_word(rng) for _ in range(rng.randint(2, 9)))
            instruction = words[0].upper() + words[1:] + "." + (" " + instruction if rng.random() < 0.5 else "")
        listed = described
        if label_list and ((not described and rng.random() < 0.9) or rng.random() < 0.15):
            listed = True
            instruction += (
                rng.choice([" Answer with one of: ", " Choose one of: ", " The answer is one of "]) + label_list + "."
            )
        if kind == "rule":
            text, fields, thresholds, places = worlds.rule_text(
                numpy_rng, self.clauses, self.names, self.labels, self.last, main_share=0.8
            )
            lead = instruction + " " if rng.random() < 0.6 else ""
            tail = " " + instruction if not lead and rng.random() < 0.1 else ""
            self.field_places = [len(lead) + place for place in fields]
            self.threshold_places = [len(lead) + place for place in thresholds]
            self.label_places = [len(lead) + place for place in places]
            instruction, listed = lead + text + tail, True
        self.listed[self.main] = listed
        if rng.random() < mix.reasoning:
            outputs = (template.REASONING, *outputs)
            self.main += 1
            self.listed.insert(0, False)
            self.outputs = [("", *values) for values in self.outputs]
        return template.Shape(inputs, outputs), instruction

    def _inputs(self, several: bool, kind: str, mix: Mix) -> tuple[Field, ...]:
        rng = self._rng

        def described(field: Field) -> Field:
            if not self._any_inputs or rng.random() < 0.75:
                return field
            words = " ".join(any_word(rng) for _ in range(rng.randint(1, 3)))
            return Field(field.name, field.kind, words)

        if several:
            of_all = rng.choice(["str", "float"])
            mixed = self._any_inputs and rng.random() < 0.3
            kinds = [
                ("int" if fmt in ("d", "dd", "ddd") and rng.random() < 0.6 else rng.choice(["str", "float"]))
                if mixed
                else of_all
                for fmt in self._formats
            ]
            fields = [described(Field(name, of)) for name, of in zip(self.names, kinds, strict=True)]
        else:
            name = rng.choice(_TEXT_INPUTS if kind == "text" else _SINGLE_INPUTS)
            if self._any_inputs:
                name = any_name(rng, self._pieces)
            fields = [described(Field(name))]
        self._carriers = {field.name for field in fields}
        if rng.random() < mix.extra_inputs:
            for _ in range(rng.choice([1, 1, 2, 3])):
                name, of = any_name(rng, self._pieces), rng.choice(["str", "str", "int", "float", "bool"])
                if name not in {*self.names, *(field.name for field in fields)}:
                    fields.insert(rng.randint(0, len(fields)), described(Field(name, of)))
                    self._extra_values[name] = self._said_nothing(of)
        return tuple(fields)

    def _said_nothing(self, kind: str) -> list[str]:
        rng = self._rng
        if kind == "bool":
            return [rng.choice(["True", "False"]) for _ in range(self._n_turns)]
        if kind in ("int", "float"):
            fmt = rng.choice(["d", "dd", "ddd"] if kind == "int" else ["d.d", "0.dd", "dd.d", "d.dd"])
            return [print_number(rng.random(), fmt) for _ in range(self._n_turns)]
        words = [worlds.text_word(rng) for _ in range(rng.randint(2, 8))]
        longest = rng.choice([1, 1, 3])
        return [" ".join(rng.choice(words) for _ in range(rng.randint(1, longest))) for _ in range(self._n_turns)]

    def _outputs(self, inputs: tuple[Field, ...], mix: Mix) -> tuple[tuple[Field, ...], str, bool]:
        """The output fields, the main one's values as a list, and whether its field says them."""
        rng = self._rng
        n = rng.choices((1, 2, 3)[: len(mix.n_outputs)], mix.n_outputs)[0]
        taken = {*self.names, *(field.name for field in inputs), "answer"}
        names: list[str] = []
        style = rng.random()
        while len(names) < n:
            if not names and style < mix.plain_answer:
                names.append("answer")
                continue
            any_at_all = names or rng.random() < mix.any_output
            name = any_name(rng, self._pieces) if any_at_all else rng.choice(_PLAIN_OUTPUTS)
            if name not in taken:
                names.append(name)
                taken.add(name)
        rng.shuffle(names)
        self.main = rng.randrange(n)
        self.listed = [False] * n
        columns: list[list[str]] = []
        fields: list[Field] = []
        main_list, main_described = "", False
        for i, name in enumerate(names):
            if i == self.main:
                kind, values, classes = self._main_kind, self.labels, self.classes
            else:
                kind = rng.choices(("str", "bool", "int"), (2, 1, 1))[0]
                classes = self._further_classes(kind)
                values = self._values(kind, int(classes.max()) + 1 if kind != "bool" else 2, mix)
            listed = rng.sample(values, len(values)) if rng.random() < 0.5 else list(values)
            text = self._listed(kind, listed, ranges=mix.vague > 0)
            literal = tuple(listed) if kind == "str" and rng.random() < mix.literal else None
            described = literal is None and rng.random() < (0.65 if kind == "str" else 0.3)
            words = text if described else ""
            if mix.vague > 0 and rng.random() < mix.vague:
                # words that say what a value means, not what it is
                described, words = False, self._vague(kind)
            fields.append(Field(name, kind, words, literal))
            columns.append([values[c] for c in classes])
            # what the type alone says counts as said: True or False, some number
            self.listed[i] = literal is not None or described or kind == "bool" or (kind == "int" and mix.vague > 0)
            if i == self.main:
                main_list = "" if literal is not None or kind == "bool" else text
                main_described = self.listed[i]
        self.outputs = list(zip(*columns, strict=True))
        return tuple(fields), main_list, main_described

    def _listed(self, kind: str, values: list[str], *, ranges: bool) -> str:
        """An output's values in words, consecutive numbers as a range where ``ranges`` are allowed."""
        rng = self._rng
        numbers = sorted(map(int, values)) if kind == "int" and ranges else []
        if len(numbers) > 2 and numbers[-1] - numbers[0] == len(numbers) - 1 and rng.random() < 0.5:
            return f"{numbers[0]}{rng.choice([' to ', ' to ', '-'])}{numbers[-1]}"
        if not values[1:]:
            return ""
        return ", ".join(values[:-1]) + rng.choice([", or ", ", or ", " or ", ", "]) + values[-1]

    def _vague(self, kind: str) -> str:
        """A description that does not say the values."""
        rng = self._rng
        lead = {"bool": ("whether", "is", "if"), "int": ("how", "number of", "the")}.get(kind, ("the", "which", "what"))
        words = " ".join(worlds.text_word(rng) for _ in range(rng.randint(1, 4)))
        return f"{rng.choice(lead)} {words}" if rng.random() < 0.8 else words

    def _further_classes(self, kind: str) -> npt.NDArray[np.int64]:
        """Classes of a further output: a function of the main class, or on which side of its median a feature is."""
        rng = self._rng
        if self.n_features and rng.random() < 0.4:
            feature = rng.randrange(self.n_features)
            column = np.array([float(row[feature]) for row in self.printed])
            return np.asarray(column > np.median(column), np.int64)
        n_classes = len(self.labels)
        n = 2 if kind == "bool" else rng.randint(2, n_classes)
        onto = [*range(n), *(rng.randrange(n) for _ in range(n_classes - n))]
        rng.shuffle(onto)
        return np.array(onto, np.int64)[self.classes]

    def turn_text(self, i: int, mix: Mix) -> Turn:
        """Turn ``i`` in words."""
        rng, printed = self._rng, self.printed[i]
        supplied = not self.shape.reasoning or i > 2 or rng.random() < 0.5
        text = USER + ("" if supplied else template.INCOMPLETE_PREFIX)
        values: list[_Value] = []
        sentence = (0, 0)
        several = set(self.names) == self._carriers and self.n_features > 0
        for n, field in enumerate(self.shape.inputs):
            text += "\n\n[[ ## " if n else "[[ ## "
            name_start = len(text)
            text += f"{field.name} ## ]]\n"
            if field.name not in self._carriers:
                text += self._extra_values[field.name][i]
            elif several:
                values.append((name_start, name_start + len(field.name), len(text)))
                text += printed[self.names.index(field.name)]
            elif self._sentences:
                sentence = (len(text), len(text) + len(self._sentences[i]))
                text += self._sentences[i]
            else:
                for j, (name, value) in enumerate(zip(self.names, printed, strict=True)):
                    text += "" if j == 0 else " " if self._style == 0 else ", "
                    name_start = len(text)
                    text += {2: f"{name}=", 3: f"{name} ", 4: f"{name}: "}.get(self._style, "")
                    values.append((name_start, name_start + (len(name) if self._style > 1 else 0), len(text)))
                    text += value
        long_request = i > 0 and any(field.literal is not None for field in self.shape.outputs)
        if supplied and rng.random() < (mix.request * 0.3 if long_request else mix.request if i else 0.7):
            text += template.request_text(self.shape)
        text += ASSISTANT
        answer, label_at, spans = self._answer(i, mix, supplied, len(text))
        return Turn(text + answer + END, values, label_at, spans, sentence)

    def _answer(self, i: int, mix: Mix, supplied: bool, start: int) -> tuple[str, int, list[Span]]:
        """An assistant message that begins at character ``start``, the place of its main label, and its spans."""
        label, values = self.outputs[i][self.main], list(self.outputs[i])
        if self.shape.reasoning:
            values[0] = f"It looks like {label}." if supplied else template.NOT_SUPPLIED
        parts = template.answer_parts(self.shape, tuple(values))
        later = 1.0 if self.same_start else mix.later_weight
        naming = mix.name_weight * (1.0 if i == 0 else 0.25)
        spans: list[Span] = []
        at, label_at = start, start
        for n, field in enumerate(self.shape.outputs):
            marker, value = parts[2 * n], parts[2 * n + 1]
            name_at = at + marker.index("## ") + 3
            spans.append(Span(at, name_at, mix.next_weight if n else 0.0))
            at += len(marker)
            spans.append(Span(name_at, at, naming, naming, naming=i == 0))
            if field == template.REASONING:
                thought = at + (len("It looks like ") if supplied else 0)
                spans.append(Span(at, thought, mix.thought_weight, mix.thought_weight))
                if supplied:
                    spans.append(Span(thought, thought + len(label), 0.9, later, self.main))
                spans.append(Span(thought + (len(label) if supplied else 0), at + len(value)))
            else:
                main = n == self.main
                label_at = at if main else label_at
                spans.append(Span(at, at + len(value), 1.0 if main else 0.7, later if main else mix.later_weight, n))
            at += len(value)
        spans.append(Span(at, at + len(parts[-1]) + len(END), mix.next_weight, 0.02))
        return "".join(parts), label_at, spans

    def printed_shares(self) -> npt.NDArray[np.float32]:
        """(P, S) printed values as shares of their format's range."""
        shares = np.zeros((N_TURNS, N_SLOTS), np.float32)
        ranges = np.array([FORMAT_RANGE[fmt] for fmt in self._formats])
        shares[:, : self.n_features] = np.array(self.printed[:N_TURNS], dtype=np.float64) / ranges
        return shares

    def rule_targets(self) -> dict[str, Any]:
        """Targets of the rule-reading heads; all "nowhere" when no rule is stated."""
        same = np.zeros((N_TURNS, N_SLOTS, N_CLAUSES + 1), np.float32)
        first = np.full((N_TURNS, N_SLOTS), N_CLAUSES, np.int64)
        fired = np.zeros(N_TURNS, np.int64)
        for slot in range(self.n_features):
            own = [i for i, clause in enumerate(self.clauses) if clause.feature == slot]
            same[:, slot, own if own else N_CLAUSES] = 1.0 / max(len(own), 1)
            for turn, printed in enumerate(self.printed[:N_TURNS]):
                first[turn, slot] = next((i for i in own if self.clauses[i].holds(printed[slot])), N_CLAUSES)
        if self.clauses:
            fired = np.array([self._decide(printed)[0] for printed in self.printed[:N_TURNS]], np.int64)
        return {"same_field": same, "first_true": first, "fired": fired}
