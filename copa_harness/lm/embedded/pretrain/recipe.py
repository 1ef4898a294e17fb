"""What a pretraining run does: seed, sizes, stages, learning rates.

The shipped weights come from two runs, one after the other: ``FOUNDATION`` (from nothing, numbers and rules, almost
always an output called ``answer``) and ``OWN_NAMES``, which started from its weights (any fields, several outputs, all
output types, sentences).
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from copa_harness.lm.embedded.pretrain.episodes import Mix


@dataclass(frozen=True, slots=True)
class Stage:
    """Some steps at one row length and one mix.

    Attributes:
        steps, rows, tokens: How many batches of which shape.
        probe_weight, pull_weight: Of the supervision's two losses.
        mix: What the episodes are made of.
        name_layer: Where numbers are pulled to look at their field's name: 1 at first (easier to learn), 0 later, where
            the name's tokens are still plain embeddings; then only the first turns are supervised.
        decide: Whether answers are pulled to the value that makes a stated clause fire.
        words: Whether answers shall also know the key words of their own sentence.
        gather: Whether these answers are also pulled to look at the sentence.
        rate: Share of the run's learning rates.
        slope: Shares at the stage's first step and after its last one, a line between them; replaces ``rate`` and the
            run's decay.
        partner: Takes every second step with its own rows and mix.
    """

    name: str
    steps: int
    rows: int
    tokens: int
    probe_weight: float
    pull_weight: float
    mix: Mix
    name_layer: int = 1
    decide: bool = False
    words: bool = False
    gather: bool = False
    rate: float = 1.0
    slope: tuple[float, float] | None = None
    partner: Stage | None = None

    def at(self, step: int) -> Stage:
        """This stage at even steps, its partner (when it has one) at odd ones."""
        return self.partner if self.partner is not None and step % 2 else self


@dataclass(frozen=True, slots=True)
class Recipe:
    """A whole run.

    Attributes:
        seed: Of tokenizer, initial weights and all episodes.
        width, n_layers, n_heads, feed_forward: Sizes of the network.
        muon_rate: Learning rate of the matrices inside the layers.
        adam_rate: Learning rate of everything else.
        muon_decay: Decoupled weight decay of those matrices, per unit of learning rate; without it the first layer's
            output drowns the rest of the residual stream.
        warmup_steps: Linear rise of both.
        decay_steps: Linear fall of both to ``final_share`` over the last steps of the stages without a slope.
    """

    seed: int
    width: int
    n_layers: int
    n_heads: int
    feed_forward: int
    muon_rate: float
    adam_rate: float
    warmup_steps: int
    decay_steps: int
    stages: tuple[Stage, ...]
    muon_decay: float = 0.2
    final_share: float = 0.02

    @property
    def total_steps(self) -> int:
        """Steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def stage_at(self, step: int) -> tuple[int, Stage]:
        """First step of the stage of a step (counted from 0), and the stage; the last one goes on for ever."""
        start = 0
        for stage in self.stages[:-1]:
            if step < start + stage.steps:
                return start, stage
            start += stage.steps
        return start, self.stages[-1]

    def rate_share(self, step: int) -> float:
        """Share of the full learning rate at a step."""
        start, stage = self.stage_at(step)
        if stage.slope is not None:
            return stage.slope[0] + (stage.slope[1] - stage.slope[0]) * (step - start) / stage.steps
        end = sum(stage.steps for stage in self.stages if stage.slope is None)
        rise = min(1.0, (step + 1) / self.warmup_steps)
        fall = min(1.0, max(self.final_share, (end - step) / self.decay_steps))
        return rise * fall * stage.rate


_BARE = Mix(
    kinds=(1, 0, 0, 0.3),
    n_features=(2, 2, 0, 0, 0),
    n_classes=(1, 1, 0.2),
    formats=(6, 2, 0.3, 0.3, 0.3, 0.3, 0.3),
    several_fields=0.0,
    single_styles=(6, 1, 1, 0, 0),
    spreads=(0.02, 0.05),
    system=0.0,
    literal=0.0,
    reasoning=0.0,
    plain_answer=1.0,
)
_SHORT = Mix(
    kinds=(1, 0.1, 0.1, 0.6),
    n_features=(2, 2, 2, 1, 0),
    several_fields=0.3,
    single_styles=(3, 1, 4, 0.5, 0.5),
    spreads=(0.02, 0.06),
    system=0.4,
    literal=0.05,
    reasoning=0.0,
    plain_answer=1.0,
)
_RULES = Mix(
    kinds=(0.35, 0, 0, 1),
    n_features=(1, 2, 2, 1, 0),
    several_fields=0.3,
    single_styles=(1, 1, 6, 1, 1),
    system=0.0,
    literal=0.0,
    reasoning=0.0,
    plain_answer=1.0,
)
_FULL = Mix(
    kinds=(1, 0.15, 0.1, 0.7),
    n_features=(1, 1.5, 2, 3, 0.5),
    several_fields=0.5,
    spreads=(0.03, 0.08),
    system=0.9,
    literal=0.1,
)
_LONG = Mix(
    kinds=(1, 0.15, 0.12, 0.25),
    n_features=(0.7, 1.2, 2, 4, 1),
    several_fields=0.5,
    single_styles=(1.5, 0.7, 6, 1, 1),
    stretch=0.35,
)
_READ = Mix(
    kinds=(0.15, 0, 0, 1),
    n_features=(1, 1.5, 2, 3, 0.5),
    several_fields=0.55,
    single_styles=(0.5, 0.5, 6, 1, 1),
    literal=0.12,
    reasoning=0.04,
    stretch=0.2,
)
_READING = Stage("read", 0, 18, 216, 0.7, 1.0, _READ, name_layer=0)
_DECIDING = Stage("read", 0, 18, 216, 0.7, 1.0, _READ, name_layer=0, decide=True)
_POLISH = dataclasses.replace(_LONG, reasoning=0.1, same_start=0.25, stretch=0.0)
_SPEAK = dataclasses.replace(_READ, kinds=(0.6, 0, 0, 1), reasoning=0.3, same_start=0.3)
_SPEAKING = Stage("speak", 0, 18, 216, 0.7, 1.0, _SPEAK, name_layer=0, decide=True)
_POLISHING = Stage("", 0, 3, 1400, 0.4, 0.4, _POLISH, name_layer=0, decide=True, partner=_SPEAKING)

FOUNDATION = Recipe(
    seed=0,
    width=128,
    n_layers=6,
    n_heads=4,
    feed_forward=320,
    muon_rate=0.02,
    adam_rate=3e-3,
    warmup_steps=50,
    decay_steps=2500,
    stages=(
        Stage("bare", 300, 40, 96, 1.0, 1.0, _BARE),
        Stage("short", 300, 24, 160, 1.0, 1.0, _SHORT),
        Stage("rules", 400, 30, 128, 1.0, 1.5, _RULES),
        Stage("full", 200, 15, 264, 0.7, 0.7, _FULL),
        Stage("long", 300, 9, 448, 0.4, 0.4, _LONG, name_layer=0, partner=_READING),
        Stage("settle", 1200, 9, 448, 0.4, 0.4, _LONG, name_layer=0, rate=0.35, partner=_READING),
        Stage("fine", 900, 9, 448, 0.4, 0.4, _LONG, name_layer=0, rate=0.15, partner=_READING),
        Stage("decide", 1200, 9, 448, 0.4, 0.4, _LONG, name_layer=0, decide=True, rate=0.3, partner=_DECIDING),
        dataclasses.replace(_POLISHING, name="polish", steps=360, slope=(0.06, 0.0)),
    ),
)

_OWN = Mix(
    kinds=(1, 0.12, 0.1, 0.2, 0.6),
    n_features=(0.7, 1.2, 2, 4, 1),
    n_classes=(1.2, 1.6, 0.6, 0.3, 0.15, 0.1, 0.1),
    several_fields=0.5,
    single_styles=(1.5, 0.7, 6, 1, 1),
    reasoning=0.06,
    stretch=0.3,
    plain_answer=0.4,
    any_output=0.85,
    same_start=0.12,
    n_outputs=(7, 2, 1),
    output_kinds=(8, 1, 1),
    any_inputs=0.35,
    extra_inputs=0.12,
)
_OWN_READ = dataclasses.replace(
    _OWN,
    kinds=(0.35, 0, 0, 1, 0.3),
    n_features=(1, 1.5, 2, 3, 0.5),
    n_classes=(1.0, 1.6, 0.5, 0.1, 0.1, 0.1, 0.1),
    several_fields=0.55,
    single_styles=(0.5, 0.5, 6, 1, 1),
    stretch=0.2,
)
_OWN_READING = Stage("read", 0, 14, 288, 0.5, 1.0, _OWN_READ, name_layer=0, decide=True)
_OWN_SAYING = dataclasses.replace(_OWN_READING, words=True)
_SAID = dataclasses.replace(_OWN, kinds=(1, 0.12, 0.1, 0.2, 0.8))
_WORDS = Stage("", 0, 9, 448, 0.5, 0.6, _SAID, name_layer=0, decide=True, words=True, partner=_OWN_SAYING)
_GATHER = dataclasses.replace(_WORDS, gather=True, partner=dataclasses.replace(_OWN_SAYING, gather=True))


def _spelt(mix: Mix) -> Mix:
    """More outputs, and more weight on spelling values to their end and on what follows them."""
    return dataclasses.replace(mix, n_outputs=(5, 3, 2), later_weight=0.7, next_weight=0.4)


def _gathering(mix: Mix, **changed: Any) -> Stage:
    """As `_GATHER`, of another mix; ``changed`` is what its partner's mix, that of read rules, has of its own."""
    partner = dataclasses.replace(_OWN_SAYING, gather=True, mix=dataclasses.replace(_spelt(_OWN_READ), **changed))
    return dataclasses.replace(_GATHER, mix=mix, partner=partner)


_SPELLING = _gathering(_spelt(_SAID))

_TYPED = dataclasses.replace(
    _spelt(_SAID), kinds=(1.3, 0.15, 0.12, 0.25, 0.4), n_outputs=(6, 2, 1.5), output_kinds=(6, 1.2, 1.2), vague=0.3
)
_TYPES = _gathering(_TYPED, kinds=(0.3, 0, 0, 1, 0.15), vague=0.3)
_SHOWN = dataclasses.replace(
    _TYPED,
    kinds=(1.6, 0.2, 0.15, 0.15, 0.2),
    n_features=(0.7, 1.2, 2, 4, 0.7),
    n_classes=(1.2, 1.8, 0.5, 0.2, 0.1, 0.05, 0.05),
    spreads=(0.04, 0.13),
)
_SHOWING = dataclasses.replace(_gathering(_SHOWN, kinds=(0.8, 0, 0, 1, 0.1), vague=0.3), rows=6, tokens=672)
_THINKING = _gathering(dataclasses.replace(_SHOWN, reasoning=0.3), kinds=(0.6, 0, 0, 1, 0.1), vague=0.3, reasoning=0.3)
_SETTLING = _gathering(
    dataclasses.replace(_SHOWN, reasoning=0.12, thought_weight=0.4),
    kinds=(0.5, 0, 0, 1, 0.1),
    vague=0.3,
    reasoning=0.15,
    thought_weight=0.4,
)

OWN_NAMES = dataclasses.replace(
    FOUNDATION,
    decay_steps=1,
    stages=(
        Stage("names", 300, 9, 448, 0.4, 0.4, _OWN, name_layer=0, decide=True, rate=0.3, partner=_OWN_READING),
        dataclasses.replace(_WORDS, name="words", steps=300, slope=(0.2, 0.1625)),
        dataclasses.replace(_GATHER, name="gather", steps=300, slope=(0.17, 0.114)),
        dataclasses.replace(_SPELLING, name="spelling", steps=400, slope=(0.12, 0.02)),
        dataclasses.replace(_SPELLING, name="lengths", steps=80, rows=3, tokens=1400, slope=(0.02, 0.002)),
        dataclasses.replace(_TYPES, name="types", steps=520, slope=(0.12, 0.012)),
        dataclasses.replace(_TYPES, name="long types", steps=120, rows=3, tokens=1400, slope=(0.012, 0.002)),
        dataclasses.replace(_SHOWING, name="showing", steps=480, slope=(0.12, 0.01)),
        dataclasses.replace(_SHOWING, name="long showing", steps=60, rows=3, tokens=1400, slope=(0.01, 0.002)),
        dataclasses.replace(_THINKING, name="thinking", steps=260, slope=(0.07, 0.004)),
        dataclasses.replace(_SETTLING, name="settling", steps=1080, slope=(0.15, 0.006)),
        dataclasses.replace(_SETTLING, name="long settling", steps=100, rows=3, tokens=1400, slope=(0.006, 0.001)),
    ),
)
