"""From logits to answers: how each row of a batch picks its tokens, when it stops, and the engine's own decoding loop.

Every row has rules and random numbers of its own (`DecodingRules`, `RowState`), so requests with different
temperatures, limits and stop strings share a batch and none can tell who else was in it. Sampling is by inversion: one
uniform number per token against the cumulative probabilities in token order. A step whose choice hangs on less than
rounding (a near-tie) is flagged, since there the batch could decide; that token is then looked at again, alone.

`CascadeRun` is the engine's own loop, over a cascade cache, [shared states, kept once | own tokens]. Rows join it and
leave it between any two steps. A step reads the token that each row chose last and chooses the next. Where few rows
are left, it reads what is likely to come along with it (`Guesses`; Saxena 2023, "Prompt lookup decoding"): on a CPU a
few tokens take hardly longer than one. Each is chosen from the logits behind the one before, by the same rules.
`RowChooser` and `RowStopper` do the same choosing and stopping within the library's `generate`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from copa_harness.lm.local.attention import CascadeCache, causal_bias
from copa_harness.lm.local.llama import FusedLora, LayerStates, LoraRows, PrefixStates
from copa_harness.lm.local.memory import TokenLimits

NEAR_TIE = {"float32": 3e-5}
"""Largest gap between the two best logits, relative to the largest logit, that the rounding of a batch may turn."""

TIE = 5e-6
"""The same for a plain forward of the row alone. The rounding of either was 1.6e-6 at most, half of the time 4e-7."""

NEAR_EDGE = 2e-5
"""The same for a sampled token: distance in probability to a neighbour's edge, or to the top_p cut."""

SHRINK_SHARE = 0.125
"""Share of places left empty from which a batch is closed up; copying the others' states costs about one step."""

FIRST_ROOM_TOKENS = 64
"""Room for new tokens a row starts with; grows when answers are longer."""

NEAR_CHOICE = 1e-3
"""Two continuations whose log-probabilities differ by less are scored again, alone."""

STEP_TOKENS = 16
"""Most tokens that a step with guesses reads; from then on every further one takes its full time."""

FIRST_GUESS = 8
"""Tokens of a row's first guess."""

LEAST_RIGHT = 1 / 3
"""Share of guesses that must come true: with eight rows one takes that much of a token's time, with fewer rows less."""

SHORT_LIST = 16
"""Up to so many continuations of a row all get a score; of more, those that cannot win any more are dropped."""

LEADERS = 4
"""First tokens of a long list whose continuations are scored before all others, to have a score to beat."""


@dataclass(frozen=True, slots=True)
class DecodingRules:
    """One request's rules.

    Attributes:
        max_tokens: most tokens to generate, >= 1.
        temperature: 0 is greedy.
        top_p, top_k: sampling limits, 1.0 and 0 for none.
        stop: strings that end the answer and are cut from it.
        seed: of this request's random numbers.
        n_logprobs: alternatives to report beside every token's log-probability; None reports none at all.
    """

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    stop: tuple[str, ...] = ()
    seed: int = 0
    n_logprobs: int | None = None


TokenScores = tuple[float, tuple[tuple[int, float], ...]]
"""A token's log-probability before temperature and limits, and the best (token, log-probability) at that step."""


@dataclass(slots=True, eq=False)
class RowState:
    """What one row has generated so far, and how it goes on.

    Attributes:
        rules: the request's.
        eos_ids: tokens that end the answer.
        decode: tokens to text.
        is_cancelled: whether nobody waits for it any more.
        ids, logprobs: what was generated.
        near_tie: whether one of its tokens hung on rounding.
        reason: why it has ended; None while it goes on.
        text: the answer, where a stop string has cut it.
    """

    rules: DecodingRules
    eos_ids: frozenset[int] = frozenset()
    decode: Callable[[Sequence[int]], str] = lambda ids: ""
    is_cancelled: Callable[[], bool] = lambda: False
    ids: list[int] = field(default_factory=list)
    logprobs: list[TokenScores] = field(default_factory=list)
    near_tie: bool = False
    reason: Literal["stop", "length", "cancelled"] | None = None
    text: str | None = None
    _uniforms: Any = None

    def uniform(self) -> float:
        """The random number of the next token."""
        if self._uniforms is None:
            self._uniforms = np.random.default_rng(self.rules.seed).random(self.rules.max_tokens + 2)
        return float(self._uniforms[min(len(self.ids), len(self._uniforms) - 1)])

    def note_scores(self, scores: Any, token: int) -> None:
        """Keep the log-probability of the next token, if the request asks for it; `scores` are its logits [V]."""
        if self.rules.n_logprobs is not None and self.reason is None:
            self.logprobs.append(_token_scores(scores, token, self.rules))

    def take(self, token: int) -> None:
        """The next token is this one, unless the answer has ended."""
        if self.reason is not None:
            return
        self.ids.append(token)
        rules = self.rules
        if token in self.eos_ids:
            self.reason = "stop"
        elif rules.stop and (text := self._cut()) is not None:
            self.reason, self.text = "stop", text
        elif len(self.ids) >= rules.max_tokens:
            self.reason = "length"
        elif self.is_cancelled():
            self.reason = "cancelled"

    def _cut(self) -> str | None:
        """The text before the first stop string, if one has come."""
        # A stop string lies in the last tokens: one per character at most, and a few for broken characters.
        tail = self.decode(self.ids[-(max(map(len, self.rules.stop)) + 8) :])
        if not any(stop in tail for stop in self.rules.stop):
            return None
        text = self.decode(self.ids)
        found = [text.find(stop) for stop in self.rules.stop if stop in text]
        return text[: min(found)] if found else None


def choose(scores: Any, rows: Sequence[RowState], *, tie: float) -> tuple[Any, Any]:
    """The next token of some rows, and whether it hangs on a near-tie.

    Args:
        scores: logits, shape [len(rows), vocabulary].
        rows: whose they are.
        tie: gap of the two best logits, relative to the largest, that counts as a near-tie; 0 where none is looked for.

    Returns:
        Token ids and flags, both of shape [len(rows)].
    """
    import torch

    tokens = scores.argmax(dim=-1)
    near = torch.zeros(len(rows), dtype=torch.bool, device=scores.device)
    if tie:
        low, high = scores.aminmax(dim=-1)
        second = scores.scatter(1, tokens[:, None], -torch.inf).amax(dim=-1)
        near = (high - second) < tie * torch.maximum(high.abs(), low.abs())
    sampled = [place for place, row in enumerate(rows) if row.rules.temperature > 0]
    if sampled:
        chosen, edge = _sample(scores[sampled], [rows[place] for place in sampled])
        tokens[sampled] = chosen
        near[sampled] = edge < NEAR_EDGE if tie else torch.zeros_like(edge, dtype=torch.bool)
    return tokens, near


class RowChooser:
    """A logits processor of the library's `generate` that puts each row's choice on top.

    Args:
        rows: the batch's rows in order.
        dtype: of the model's arithmetic; near-ties are looked for where batching is exact but for rounding.
    """

    def __init__(self, rows: Sequence[RowState], *, dtype: str) -> None:
        self._rows = rows
        self._tie = NEAR_TIE.get(dtype, 0.0)
        self._near_steps: list[Any] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """The scores (shape [rows, vocabulary], changed in place) with every sampled row's choice on top."""
        import torch

        tokens, near = choose(scores, self._rows, tie=self._tie)
        self._near_steps.append(near)
        for i, row in enumerate(self._rows):
            row.note_scores(scores[i], tokens[i])
            if row.rules.temperature > 0:
                scores[i] = -torch.inf
                scores[i, tokens[i]] = 0.0
        return scores

    def note_near_ties(self) -> None:
        """After the library's `generate`: mark the rows that kept a token chosen on a near-tie."""
        import torch

        steps = torch.stack(self._near_steps).tolist()
        for i, row in enumerate(self._rows):
            row.near_tie = any(steps[step][i] for step in range(min(len(row.ids), len(steps))))


def _sample(scores: Any, rows: Sequence[RowState]) -> tuple[Any, Any]:
    """Chosen token ids and each row's distance to the nearest edge; shapes [rows]."""
    import torch

    def column(values: Any) -> Any:
        return torch.as_tensor(values, dtype=torch.float64, device=scores.device)[:, None]

    rules = [row.rules for row in rows]
    temperatures, top_ps = (column([getattr(one, name) for one in rules]) for name in ("temperature", "top_p"))
    probabilities = torch.softmax(scores.double() / temperatures, dim=-1)
    for place, one in enumerate(rules):
        if one.top_k:
            kept = probabilities[place].topk(min(one.top_k, probabilities.shape[-1])).indices
            mask = torch.zeros_like(probabilities[place]).scatter_(0, kept, 1.0)
            probabilities[place] = probabilities[place] * mask / (probabilities[place] * mask).sum()
    edge = torch.ones(len(scores), dtype=torch.float64, device=scores.device)
    if bool((top_ps < 1).any()):
        ordered, order = probabilities.sort(dim=-1, descending=True)
        before = ordered.cumsum(-1) - ordered
        outside = (before >= top_ps) & (top_ps < 1)
        outside[:, 0] = False
        distance = (before - top_ps).abs().amin(-1)
        edge = torch.where(top_ps[:, 0] < 1, distance, edge)
        probabilities = probabilities.masked_fill(torch.zeros_like(outside).scatter(1, order, outside), 0.0)
    cumulative = probabilities.cumsum(-1)
    total = cumulative[:, -1:]
    target = column([row.uniform() for row in rows]) * total
    chosen = torch.searchsorted(cumulative, target, right=True).clamp(max=scores.shape[-1] - 1)
    edge = torch.minimum(edge, ((cumulative - target).abs() / total).amin(-1))
    return chosen[:, 0], edge


def _token_scores(scores: Any, token: Any, rules: DecodingRules) -> TokenScores:
    import torch

    logprobs = torch.log_softmax(scores.double(), dim=-1)
    best = logprobs.topk(min(rules.n_logprobs or 1, len(logprobs)))
    top = tuple(zip(best.indices.tolist(), best.values.tolist(), strict=True)) if rules.n_logprobs else ()
    return float(logprobs[token]), top


class RowStopper:
    """A stopping criterion of the library's `generate` that ends each row by its own rules and keeps what came."""

    def __init__(self, rows: Sequence[RowState]) -> None:
        self._rows = rows

    def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        """Take every row's newest token; returns which rows are done (bool, shape [rows])."""
        import torch

        for row, token in zip(self._rows, input_ids[:, -1].tolist(), strict=True):
            row.take(token)
        return torch.tensor([row.reason is not None for row in self._rows], device=input_ids.device)


class Reader(Protocol):
    """What reads new tokens into a batch's states; see `LlamaDecoder.read`."""

    n_layers: int

    def read(
        self, ids: Any, *, positions: Any, bias: Any, cascade: CascadeCache, n_kept: int, loras: Sequence[LoraRows] = ()
    ) -> Any:
        """Logits of the last `n_kept` (at least 1) of the new tokens `ids` [rows, new]."""


class LibraryReader:
    """Any fitting model of transformers, with one adapter, or none, active for all rows.

    Args:
        module: the model.
        activate: called before every forward: makes the adapter the active one.
    """

    def __init__(self, module: Any, activate: Callable[[], Any] = lambda: None) -> None:
        self._module, self._activate = module, activate
        self.n_layers = int(module.config.get_text_config(decoder=True).num_hidden_layers)

    def read(
        self, ids: Any, *, positions: Any, bias: Any, cascade: CascadeCache, n_kept: int, loras: Sequence[LoraRows] = ()
    ) -> Any:
        """Logits of the last `n_kept` of the new tokens `ids` [rows, new]."""
        if loras:
            raise ValueError("got rows of several adapters; expected the one that is active in the module")
        self._activate()
        if bias is None:  # transformers takes a mask of four dimensions as it is; without one it would make its own
            bias = causal_bias(ids.shape[1], cascade.longest, dtype=self._module.dtype, device=ids.device)
        with cascade.in_use(self._module):
            output = self._module(
                input_ids=ids,
                attention_mask=bias.to(self._module.dtype),
                position_ids=positions,
                past_key_values=cascade.cache,
                use_cache=True,
                logits_to_keep=n_kept,
            )
        return output.logits


@dataclass(slots=True, eq=False)
class Row:
    """A row on its way through a `CascadeRun`.

    Attributes:
        ids: prompt tokens behind the shared states, at least one.
        n_shared: tokens of the shared states.
        shared: those states in order; see `CascadeCache`.
        lora: the adapter that answers it, where the reader mixes adapters.
        state: how it decodes.
        guesses: how it may go on.
        n_ties: near-ties met.
        failure: what went wrong with this row alone.
        next: the token that is read next: its prompt's last one at first, then the one chosen last.
    """

    ids: Sequence[int]
    n_shared: int = 0
    shared: tuple[Any, ...] = ()
    lora: FusedLora | None = None
    state: RowState = field(default_factory=lambda: RowState(DecodingRules(1)))
    guesses: Guesses = field(default_factory=lambda: Guesses(()))
    n_ties: int = 0
    failure: Exception | None = None
    next: int = field(init=False)

    def __post_init__(self) -> None:
        self.next = self.ids[-1]

    @property
    def is_going(self) -> bool:
        """Whether it goes on."""
        return self.state.reason is None and not self.state.near_tie and self.failure is None


class CascadeRun:
    """Rows that decode together.

    Args:
        reader: the model.
        device: where it computes.
        pad_id: any token id.
        tie: see `choose`.
        limits: how many tokens go through the model at once.
    """

    def __init__(
        self, reader: Reader, *, device: Any, pad_id: int, tie: float = 0.0, limits: TokenLimits | None = None
    ) -> None:
        self._reader, self._device, self._pad_id, self._tie = reader, device, pad_id, tie
        self._limits = limits or TokenLimits()
        self._places: list[Row | None] = []
        self._cascade = CascadeCache(reader.n_layers, [], room=0, device=device)

    @property
    def rows(self) -> list[Row]:
        """The rows in it."""
        return [row for row in self._places if row is not None]

    def add(self, rows: Sequence[Row], *, room: int) -> None:
        """Read the rows' prompts but for their last tokens; the next step reads those, and chooses.

        Args:
            rows: in any order.
            room: new tokens per row to make room for.
        """
        for part in _parts(rows, n_at_once=self._limits.read):
            cascade = CascadeCache(
                self._reader.n_layers,
                [row.shared for row in part],
                room=max(len(row.ids) for row in part) + room,
                device=self._device,
            )
            own = [row.ids[:-1] for row in part]
            if any(own):
                self._read(cascade, part, own, n_kept=1)
                cascade.advance([len(ids) for ids in own])
            self._put(part, cascade)

    def join(self, other: CascadeRun) -> None:
        """Take over the rows of another run of the same model."""
        other._close_up()
        self._put(other.rows, other._cascade)

    def step(self, look_again: Callable[[Row], Any]) -> list[Row]:
        """A token or more for every row; returns the rows that leave.

        A row leaves when its answer has ended, when something went wrong with it alone, or with `state.near_tie` when a
        token hangs on rounding even alone.

        Args:
            look_again: logits [V] of a row's next token by a plain forward of the row alone, for near-ties.
        """
        self._close_up()
        rows = self.rows
        guessed = {row: row.guesses.next(row.state, n_most=STEP_TOKENS // len(rows) - 1) for row in rows}
        logits = self._read_next(guessed)
        n_read = dict.fromkeys(rows, 0)
        places = [place for place, row in enumerate(self._places) if row]
        reading = list(zip(places, rows, strict=True))
        while reading:
            depth = n_read[reading[0][1]]
            scores = logits[[place for place, _ in reading], depth]
            tokens, near = choose(scores, [row.state for _, row in reading], tie=self._tie)
            for (_, row), own, token, is_near in zip(reading, scores, tokens.tolist(), near.tolist(), strict=True):
                n_read[row] += 1
                try:
                    _take(row, own, token, is_near=is_near, look_again=look_again)
                except Exception as error:  # noqa: BLE001 - the others go on; the scheduler tells this row's caller
                    row.failure = error
            reading = [
                (place, row) for place, row in reading if row.is_going and row.next in guessed[row][depth : depth + 1]
            ]
        for row, guess in guessed.items():
            row.guesses.note(n_guessed=len(guess), n_right=n_read[row] - 1)
        self._cascade.advance([n_read[row] if row else 0 for row in self._places])
        self._places = [row if row is not None and row.is_going else None for row in self._places]
        return [row for row in rows if not row.is_going]

    def logits(self) -> Any:
        """Read every row's `next` token: the logits of the one behind it, [rows, vocabulary]."""
        logits = self._read_next({})[:, -1]
        self._cascade.advance([int(row is not None) for row in self._places])
        return logits if all(self._places) else logits[[place for place, row in enumerate(self._places) if row]]

    def _read_next(self, guessed: Mapping[Row, Sequence[int]]) -> Any:
        """Logits behind every row's `next` token and the guesses behind that, [places, tokens, vocabulary]."""
        ids = [[row.next, *guessed.get(row, ())] if row else [self._pad_id] for row in self._places]
        return self._read(self._cascade, self._places, ids, n_kept=max(map(len, ids)))

    def score(self, choices_of: Mapping[Row, Sequence[Sequence[int]]]) -> dict[Row, list[float]]:
        """Log-probability of each row's continuations, summed over their tokens.

        Their tokens read the states of the row's prompt where they are. Of a long list, those that cannot win any more
        get minus infinity; see `ChoiceRace`.

        Args:
            choices_of: for each row its continuations, each at least one token.
        """
        import torch

        self._close_up()
        rows = self.rows
        first = torch.log_softmax(self.logits().double(), dim=-1)
        races = [ChoiceRace(choices_of[row], first[i], rules=row.state.rules) for i, row in enumerate(rows)]
        prompts = [self._prompt(i, row) for i, row in enumerate(rows)]
        whole = [
            Branch(prompt, race, (k,))
            for prompt, race in zip(prompts, races, strict=True)
            if race.scores_all
            for k in range(len(race.choices))
            if not race.is_done(k)
        ]
        whole.sort(key=lambda branch: branch.n_left)
        while whole:
            n_at_once = max(1, self._limits.scored // whole[-1].n_left)
            self._score_whole(sorted(whole[-n_at_once:], key=lambda branch: prompts.index(branch.prompt)))
            del whole[-n_at_once:]
        for n_first in (LEADERS, None):
            branches = [
                Branch(prompt, race, same)
                for prompt, race in zip(prompts, races, strict=True)
                if not race.scores_all
                for same in race.branches(range(len(race.choices)))[:n_first]
            ]
            while branches:
                sizes = np.cumsum([len(branch.members) for branch in branches])
                n_at_once = max(1, int((sizes <= self._limits.scored).sum()))
                self._score_by_token(branches[:n_at_once])
                del branches[:n_at_once]
        return {row: race.scores for row, race in zip(rows, races, strict=True)}

    def _score_whole(self, branches: Sequence[Branch]) -> None:
        """Read all tokens of some continuations, each a branch of its own, at once."""
        import torch

        width = max(branch.n_left for branch in branches)
        choices = [branch.race.choices[branch.members[0]] for branch in branches]
        logits = self._read_behind(self._cascade_behind(branches), branches, [own[:-1] for own in choices])
        wanted = torch.tensor([[*own[1:], *[0] * (width - len(own) + 1)] for own in choices], device=logits.device)
        logprobs = logits.gather(-1, wanted[..., None])[..., 0].double() - logits.logsumexp(-1).double()
        for branch, own in zip(branches, logprobs, strict=True):
            branch.race.add(branch.members[0], float(own[: branch.n_left].sum()), n_tokens=branch.n_left)

    def _score_by_token(self, branches: Sequence[Branch]) -> None:
        """Read continuations token by token, a token that several begin with once, as long as they can win."""
        branches = [branch for branch in branches if branch.race.can_win(branch.members[0])]
        cascade = self._cascade_behind(branches)
        while branches:
            logits = self._read_behind(cascade, branches, [[branch.newest] for branch in branches])[:, -1]
            cascade.advance([1] * len(branches))
            open_ones = [(place, branch.race, k) for place, branch in enumerate(branches) for k in branch.members]
            places = [place for place, _, _ in open_ones]
            wanted = [race.choices[k][race.n_read[k]] for _, race, k in open_ones]
            logprobs = logits[places, wanted].double() - logits.logsumexp(-1).double()[places]
            for (_, race, k), logprob in zip(open_ones, logprobs.tolist(), strict=True):
                race.add(k, logprob)
            grown = [
                (place, branch._replace(members=same))
                for place, branch in enumerate(branches)
                for same in branch.race.branches(branch.members)
            ]
            if branches := [branch for _, branch in grown]:
                cascade.select([place for place, _ in grown])

    def _prompt(self, place: int, row: Row) -> Row:
        """A row behind the whole prompt of the row in this place, whose states stay where they are."""
        length = int(self._cascade.lengths[place])
        own = PrefixStates([LayerStates(*layer.states(place, length)) for layer in self._cascade.layers])
        return Row(row.ids[-1:], n_shared=row.n_shared + length, shared=(*row.shared, own), lora=row.lora)

    def _cascade_behind(self, branches: Sequence[Branch]) -> CascadeCache:
        room = max((branch.n_left for branch in branches), default=0)
        shared = [branch.prompt.shared for branch in branches]
        return CascadeCache(self._reader.n_layers, shared, room=room, device=self._device)

    def _read_behind(self, cascade: CascadeCache, branches: Sequence[Branch], ids: Sequence[Sequence[int]]) -> Any:
        """Logits behind every one of the new tokens of each branch."""
        return self._read(cascade, [branch.prompt for branch in branches], ids, n_kept=max(map(len, ids)))

    def _put(self, rows: Sequence[Row], cascade: CascadeCache) -> None:
        """Rows that were read take empty places, then new ones."""
        if not self.rows:
            self._places, self._cascade = list(rows), cascade
            return
        empty = [place for place, row in enumerate(self._places) if row is None]
        n = len(self._places)
        places = [*empty, *range(n, n + len(rows))][: len(rows)]
        self._cascade.put(cascade, places)
        self._places += [None] * (max(places) + 1 - n)
        for place, row in zip(places, rows, strict=True):
            self._places[place] = row

    def _close_up(self) -> None:
        """Drop empty places where there are many, and bring rows of one adapter together where they are scattered."""
        kept = [(place, row) for place, row in enumerate(self._places) if row is not None]
        loras = [id(row.lora) for _, row in kept]
        is_scattered = sum(1 for _ in groupby(loras)) > 2 * len(set(loras))
        if is_scattered or len(self._places) - len(kept) >= max(1, SHRINK_SHARE * len(self._places)):
            kept.sort(key=lambda one: id(one[1].lora))
            self._cascade.select([place for place, _ in kept])
            self._places = [row for _, row in kept]

    def _read(
        self, cascade: CascadeCache, rows: Sequence[Row | None], ids: Sequence[Sequence[int]], *, n_kept: int
    ) -> Any:
        """Append new tokens of each row to a batch; logits of the last `n_kept` places, [rows, n_kept, vocabulary].

        Shorter rows are filled up at the end, where nothing of theirs looks; the caller says by `cascade.advance` what
        is theirs.
        """
        import torch

        n_new = max(map(len, ids))
        tokens = torch.tensor([[*own, *[self._pad_id] * (n_new - len(own))] for own in ids], device=self._device)
        new = cascade.places(n_new)[1]
        bias = None
        if cascade.longest and (n_new > 1 or not cascade.is_even):
            seen = torch.arange(cascade.longest + n_new, device=self._device) <= new[..., None]
            bias = torch.zeros(seen.shape, device=self._device).masked_fill_(~seen, -torch.inf)[:, None]
        first = torch.tensor([row.n_shared if row else 0 for row in rows], device=self._device)
        return self._reader.read(
            tokens, positions=first[:, None] + new, bias=bias, cascade=cascade, n_kept=n_kept, loras=_spans(rows)
        )


class Guesses:
    """How a row may go on: as its text did the last time it had the same tokens.

    Answers repeat their prompt: markers, labels, fields. Guesses get longer as they come true and shorter as they do
    not; those from two tokens alone pause while few do. Only greedy rows guess.

    Args:
        text: tokens of the prompt; none where nothing is to be guessed.
    """

    def __init__(self, text: Sequence[int]) -> None:
        self._text, self._n_prompt = list(text), len(text)
        self._length, self._share_right = FIRST_GUESS, 0.5
        self._last: dict[tuple[int, ...], int] = {}
        self._n_known = 0

    def next(self, state: RowState, *, n_most: int) -> list[int]:
        """Up to so many tokens that may come behind the row's newest one."""
        n_most = min(n_most, self._length, state.rules.max_tokens - len(state.ids) - 1)
        if n_most < 1 or not self._n_prompt or state.rules.temperature > 0:
            return []
        self._text += state.ids[len(self._text) - self._n_prompt :]
        for end in range(self._n_known, len(self._text)):  # all but what the newest token ends
            for n in (2, 4):
                self._last[tuple(self._text[max(0, end - n) : end])] = end
        self._n_known = len(self._text)
        for n in (4, 2) if self._share_right > LEAST_RIGHT else (4,):
            start = self._last.get(tuple(self._text[-n:]))
            if start is not None:
                return self._text[start : start + n_most]
        return []

    def note(self, *, n_guessed: int, n_right: int) -> None:
        """So many were read, and so many of them came."""
        if n_guessed:
            if n_right == n_guessed:
                self._length = min(2 * self._length, STEP_TOKENS)
            elif not n_right:
                self._length = max(1, self._length // 2)
            self._share_right += (n_right / n_guessed - self._share_right) / 4


class ChoiceRace:
    """The continuations of one row: what they scored, and which of them can still win.

    A log-probability only falls with further tokens. So a continuation of which a part alone is below the best whole
    one cannot win; of a long list it is read no further and has no score. A row that draws by temperature, or has a
    short list, has all of them scored.

    Attributes:
        choices: the continuations.
        n_read: of each, the tokens that are in its score.
        scores_all: whether none is dropped.

    Args:
        choices: each at least one token.
        first: log-probabilities of the token behind the prompt, [V].
        rules: of the row.
    """

    def __init__(self, choices: Sequence[Sequence[int]], first: Any, *, rules: DecodingRules) -> None:
        self.choices = choices
        self.scores_all = len(choices) <= SHORT_LIST or rules.temperature > 0
        self.n_read = [1] * len(choices)
        self._sums: list[float] = first[[ids[0] for ids in choices]].tolist()
        self._best = max((self._sums[k] for k in range(len(choices)) if self.is_done(k)), default=-math.inf)

    @property
    def scores(self) -> list[float]:
        """Of every continuation; minus infinity for one that was dropped."""
        return [total if self.is_done(k) else -math.inf for k, total in enumerate(self._sums)]

    def is_done(self, k: int) -> bool:
        """Whether continuation k is scored to its end."""
        return self.n_read[k] == len(self.choices[k])

    def can_win(self, k: int) -> bool:
        """Whether continuation k may be the best yet, or so near to it that rounding decides."""
        return self.scores_all or self._sums[k] >= self._best - NEAR_CHOICE

    def add(self, k: int, logprob: float, *, n_tokens: int = 1) -> None:
        """The next tokens of continuation k have this log-probability."""
        self._sums[k] += logprob
        self.n_read[k] += n_tokens
        if self.is_done(k):
            self._best = max(self._best, self._sums[k])

    def branches(self, members: Iterable[int]) -> list[tuple[int, ...]]:
        """Those of some continuations that are to be read on, in groups that are one so far, likeliest first."""
        found: dict[tuple[int, ...], list[int]] = {}
        for k in members:
            if not self.is_done(k) and self.can_win(k):
                found.setdefault(tuple(self.choices[k][: self.n_read[k]]), []).append(k)
        return sorted(map(tuple, found.values()), key=lambda same: -self._sums[same[0]])


class Branch(NamedTuple):
    """Continuations of one row that are the same tokens as far as they are scored.

    Attributes:
        prompt: a row behind whose shared states they stand.
        race: theirs.
        members: which of the race's they are.
    """

    prompt: Row
    race: ChoiceRace
    members: tuple[int, ...]

    @property
    def newest(self) -> int:
        """The token that is read next; it is scored already."""
        return self.race.choices[self.members[0]][self.race.n_read[self.members[0]] - 1]

    @property
    def n_left(self) -> int:
        """Most tokens that are not scored."""
        return max(len(self.race.choices[k]) - self.race.n_read[k] for k in self.members)


def next_logits(reader: Reader, rows: Sequence[Row], *, device: Any, pad_id: int) -> Any:
    """Logits of each row's next token, [rows, vocabulary], read together."""
    run = CascadeRun(reader, device=device, pad_id=pad_id)
    run.add(rows, room=1)
    places = {row: place for place, row in enumerate(run.rows)}
    return run.logits()[[places[row] for row in rows]]


def _take(row: Row, scores: Any, token: int, *, is_near: bool, look_again: Callable[[Row], Any]) -> None:
    """The row's next token is this one; where that is near to a tie, the one it has alone."""
    if is_near:
        row.n_ties += 1
        row.state.near_tie = row.state.rules.temperature > 0
        if not row.state.near_tie:
            tokens, still = choose(look_again(row)[None], [row.state], tie=TIE)
            token, row.state.near_tie = int(tokens[0]), bool(still[0])
        if row.state.near_tie:
            return
    row.state.note_scores(scores, token)
    row.state.take(token)
    row.next = token


def _parts(rows: Sequence[Row], *, n_at_once: int) -> Iterator[list[Row]]:
    """Rows in parts to be read at once: of like lengths, and not more than so many tokens."""
    part: list[Row] = []
    for row in sorted(rows, key=lambda row: len(row.ids)):  # ascending: the row that comes is the longest
        n = len(row.ids)
        if part and ((len(part) + 1) * n > n_at_once or n > 2 * len(part[0].ids) + 16):
            yield sorted(part, key=lambda row: id(row.lora))
            part = []
        part.append(row)
    yield sorted(part, key=lambda row: id(row.lora))


def _spans(rows: Sequence[Row | None]) -> list[LoraRows]:
    """Which of the rows are answered by which adapter."""
    spans, start = [], 0
    for _, same in groupby(rows, key=lambda row: id(row.lora) if row else None):
        several = list(same)
        if several[0] is not None and several[0].lora is not None:
            spans.append(LoraRows(start, start + len(several), several[0].lora))
        start += len(several)
    return spans
