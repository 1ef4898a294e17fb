"""One synthetic in-context classification episode: its world, its words and the texts of its turns.

An episode is one system message and turns that are each a demonstration for the later ones and a query itself. Its text
is that of ``template``; its task is one of ``worlds``, as are its names and labels, unless these are random vocabulary
pieces. Symbols: P recorded turns, S feature slots, C clauses.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from copa_harness.lm.embedded.pretrain import template, worlds
from copa_harness.lm.embedded.pretrain.tokenizer import ASSISTANT, END, FORMAT_RANGE, FORMATS, USER, print_number
from copa_harness.lm.embedded.pretrain.worlds import any_word, field_names, label_words, labels_of_one_start

N_TURNS, N_SLOTS, N_CLAUSES = 24, 5, 3
_Value = tuple[int, int, int]
"""Characters: start and end of a field name, start of its value."""
_Span = tuple[int, int, float, float]
"""Characters start and end, weight of the first token and of the later ones."""
KINDS = ("gauss", "linear", "axis", "rule")
_PLAIN_OUTPUTS = ("label", "category", "class", "type", "group", "species", "result", "output")


@dataclass(frozen=True, slots=True)
class Mix:
    """What a stage's episodes are made of; probabilities unless said otherwise.

    Attributes:
        kinds: Weights of ``KINDS``.
        n_features: Weights of 1..5 features.
        n_classes: Weights of 2..4 classes.
        formats: Weights of ``tokenizer.FORMATS``.
        several_fields: Share of episodes with one input field per feature.
        single_styles: Weights of "5.1 3.5", "5.1, 3.5", "a=5.1, b=3.5", "a 5.1, b 3.5", "a: 5.1, b: 3.5".
        spreads: Standard deviations of the Gaussian classes as shares of the range, drawn uniformly.
        system: Share of episodes that have a system message at all.
        request: Share of demonstrations' turns that nevertheless carry the closing request.
        piece_labels: Share of episodes whose labels are random vocabulary pieces.
        literal: Share of ``Literal`` outputs.
        reasoning: Share of episodes with a reasoning field.
        stretch: Share of rows whose positions skip ahead between turns, so that long prompts are not new.
        plain_answer: Share of episodes whose output field is called ``answer``.
        same_start: Share of episodes whose labels all begin with the same vocabulary piece.
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
    same_start: float = 0.0


class Episode:
    """One drawn episode: its world, its words and the texts of its turns."""

    def __init__(
        self, mix: Mix, rng: random.Random, numpy_rng: np.random.Generator, pieces: list[str], *, n_turns: int
    ) -> None:
        self._rng, self._n_turns = rng, n_turns
        self.n_features = rng.choices(range(1, 6), mix.n_features)[0]
        n_classes = rng.choices((2, 3, 4), mix.n_classes)[0]
        self.kind = rng.choices(range(len(KINDS)), mix.kinds)[0]
        kind = KINDS[self.kind]
        several = rng.random() < mix.several_fields
        self._style = rng.choices(range(5), mix.single_styles)[0]
        if kind == "rule" and self._style < 2:
            self._style = 2
        self.names = field_names(rng, self.n_features, joined=several or rng.random() < 0.6)
        self.same_start = mix.same_start > 0 and rng.random() < mix.same_start
        if self.same_start:
            self.labels = labels_of_one_start(rng, n_classes, pieces)
        else:
            self.labels = label_words(rng, n_classes, pieces if rng.random() < mix.piece_labels else None)
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
        shares = self._draw(kind, n_classes, mix, numpy_rng, low, width)
        self.printed = [
            [print_number(v, f) for v, f in zip(row, self._formats, strict=True)]
            for row in low + width * np.clip(shares, 0, 1)
        ]
        if self.clauses:
            self.classes = np.array([self._decide(row)[1] for row in self.printed])
        self.field_places: list[int] = []
        self.threshold_places: list[int] = []
        self.label_places: list[int] = []
        self.shape, self.instruction = self._signature(several, kind, mix, numpy_rng)
        if kind != "rule":
            self.clauses = []

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
        output = "answer" if rng.random() < mix.plain_answer else rng.choice(_PLAIN_OUTPUTS)
        listed = rng.sample(self.labels, len(self.labels)) if rng.random() < 0.5 else list(self.labels)
        label_list = ", ".join(listed[:-1]) + rng.choice([", or ", ", or ", " or ", ", "]) + listed[-1]
        literal = tuple(listed) if rng.random() < mix.literal else None
        described = literal is None and rng.random() < 0.65
        inputs = (
            tuple(self.names)
            if several
            else (rng.choice(["features"] * 6 + ["record", "input", "text", "sample", "values", "data"]),)
        )
        shape = template.Shape(
            inputs=inputs,
            input_type=rng.choice(["str", "float"]) if several else "str",
            output=output,
            output_description=label_list if described else "",
            literal=literal,
            reasoning=rng.random() < mix.reasoning,
        )
        shown = "`" + "`, `".join(inputs) + "`"
        instruction = rng.choice(
            [
                "Classify the record.",
                "Classify the record.",
                f"Predict the {output}.",
                "Assign each record to a group.",
                f"Determine the {output} from the {rng.choice(['fields', 'values', 'features'])}.",
                f"Given the fields {shown}, produce the fields `{output}`.",
                f"Given the {' and '.join(self.names[:2])}, predict the {any_word(rng)} {output}.",
                f"Classify the {any_word(rng)}.",
                f"Decide which {any_word(rng)} it is.",
            ]
        )
        if (not described and literal is None) or rng.random() < 0.15:
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
            instruction = lead + text + tail
        return shape, instruction

    def turn_text(self, i: int, mix: Mix) -> tuple[str, list[_Value], int, list[_Span]]:
        """Text of turn ``i``, places of its values and their names, place of its label, and weighted spans."""
        rng, printed, label = self._rng, self.printed[i], self.labels[self.classes[i]]
        supplied = not self.shape.reasoning or i > 2 or rng.random() < 0.5
        text = USER + ("" if supplied else template.INCOMPLETE_PREFIX)
        values: list[_Value] = []
        name_start = 0
        if len(self.shape.inputs) == self.n_features and self.shape.inputs == tuple(self.names):
            for part_index, part in enumerate(template.user_parts(self.shape, tuple(printed))):
                if part_index % 2:
                    values.append((name_start, name_start + len(self.names[part_index // 2]), len(text)))
                else:
                    name_start = len(text) + part.index("## ") + 3
                text += part
        else:
            text += f"[[ ## {self.shape.inputs[0]} ## ]]\n"
            for j, (name, value) in enumerate(zip(self.names, printed, strict=True)):
                text += "" if j == 0 else " " if self._style == 0 else ", "
                name_start = len(text)
                text += {2: f"{name}=", 3: f"{name} ", 4: f"{name}: "}.get(self._style, "")
                values.append((name_start, name_start + (len(name) if self._style > 1 else 0), len(text)))
                text += value
        long_request = self.shape.literal is not None and i > 0
        if supplied and rng.random() < (mix.request * 0.3 if long_request else mix.request if i else 0.7):
            text += template.request_text(self.shape)
        text += ASSISTANT
        reasoning = f"It looks like {label}." if supplied else template.NOT_SUPPLIED
        before, label, after = template.answer_parts(self.shape, label, reasoning)
        start = len(text)
        label_at = start + len(before)
        label_end = label_at + len(label)
        text += before + label + after + END
        later = 1.0 if self.same_start else 0.3
        spans = [(start, label_at, 0.02, 0.02), (label_at, label_end, 1.0, later), (label_end, len(text), 0.1, 0.02)]
        if self.shape.reasoning and supplied:
            thought = start + before.index("It looks like ") + len("It looks like ")
            spans = [
                (start, thought, 0.02, 0.02),
                (thought, thought + len(label), 0.9, later),
                (thought + len(label), label_at, 0.02, 0.02),
                *spans[1:],
            ]
        return text, values, label_at, spans

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
