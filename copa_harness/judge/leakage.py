"""Leakage: test examples an optimizer has already seen, word for word or nearly.

Two examples are the same when their inputs agree after normalization (Unicode NFKC, case, punctuation and spacing);
they are near-duplicates when the sets of their token shingles (runs of `SHINGLE` tokens; Broder 1997, "On the
resemblance and containment of documents") overlap with a Jaccard index of at least `NEAR`. The same example counts
as seen: a gate on it measures memory. A near-duplicate is reported and left to the reader: templates make examples
look alike. Demonstrations in the prompt are seen by the model at test time and count like training examples.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from copa_harness.documents import canonical_json
from copa_harness.formatting import counted
from copa_harness.results import GateResult, Verdict

SHINGLE = 3
"""Tokens per shingle; shorter texts are one shingle."""

NEAR = 0.8
"""Jaccard index from which two examples are reported as near-duplicates."""

MIN_TOKENS = 8
"""Texts with fewer tokens are compared exactly only: of two short ones a single word decides everything."""

MAX_PER_SHINGLE = 200
"""A shingle shared by more examples than this is part of a template and proposes no pair."""

# Words, numbers with their separators, and symbols that carry meaning (a minus, an operator); no sentence marks.
_TOKEN = re.compile(r"""\w+(?:[.,]\d+)*|[^\w\s.,;:!?'"`\u2018\u2019\u201c\u201d\u2026]""")

Fields = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Overlap:
    """A test example and something seen that is the same, or nearly.

    Attributes:
        example_id: the test example.
        seen_in: where its twin is: a split's name, or "demonstrations".
        seen_id: the twin's id.
        similarity: 1 for the same normalized content, else the Jaccard index.
    """

    example_id: str
    seen_in: str
    seen_id: str
    similarity: float


@dataclass(frozen=True, slots=True)
class LeakageReport:
    """What of a split was seen before.

    Attributes:
        n: examples of the split.
        same: examples whose normalized inputs were seen.
        near: examples that resemble something seen, most alike first; none of them is in `same`.
    """

    n: int
    same: tuple[Overlap, ...]
    near: tuple[Overlap, ...]

    @property
    def seen_ids(self) -> frozenset[str]:
        """Ids of the examples a gate must not count."""
        return frozenset(overlap.example_id for overlap in self.same)

    def text(self, *, n_shown: int = 5) -> str:
        """Lines for a report; "" when nothing was seen."""
        lines = []
        if self.same:
            lines.append(f"{len(self.seen_ids)} of {counted(self.n, 'example')} were seen before:")
            lines += [f"  {row.example_id} is {row.seen_in} {row.seen_id}" for row in self.same[:n_shown]]
        if self.near:
            n_near = len({row.example_id for row in self.near})
            lines.append(f"{n_near} of {counted(self.n, 'example')} nearly repeat something seen (not refused):")
            lines += [
                f"  {row.example_id} and {row.seen_in} {row.seen_id}: {100 * row.similarity:.0f} % of shingles shared"
                for row in self.near[:n_shown]
            ]
        return "\n".join(lines)


def find_leakage(
    examples: Mapping[str, Fields], *, seen: Mapping[str, Mapping[str, Fields]], near: float = NEAR
) -> LeakageReport:
    """Compare a split with everything an optimizer or a prompt has seen.

    Args:
        examples: input fields of the test examples by id.
        seen: the same of each other source by its name (`train`, `validation`, `demonstrations`).
        near: Jaccard index from which near-duplicates are reported, 0..1; above 1 looks for none.
    """
    known: dict[str, tuple[str, str]] = {}
    sources: list[tuple[str, str, frozenset[tuple[str, ...]]]] = []
    for source, rows in seen.items():
        for example_id, fields in rows.items():
            known.setdefault(normalized(fields), (source, example_id))
            sources.append((source, example_id, shingles(fields)))
    index: dict[tuple[str, ...], list[int]] = {}
    for position, (_, _, pieces) in enumerate(sources):
        for piece in pieces:
            index.setdefault(piece, []).append(position)
    same: list[Overlap] = []
    close: list[Overlap] = []
    for example_id, fields in examples.items():
        twin = known.get(normalized(fields))
        if twin is not None:
            same.append(Overlap(example_id, *twin, 1.0))
            continue
        pieces = shingles(fields)
        shared: Counter[int] = Counter()
        for piece in pieces:
            positions = index.get(piece, ())
            if len(positions) <= MAX_PER_SHINGLE:
                shared.update(positions)
        best = max(((_jaccard(pieces, sources[position][2]), -position) for position in shared), default=(0.0, 0))
        if best[0] >= near:
            source, seen_id, _ = sources[-best[1]]
            close.append(Overlap(example_id, source, seen_id, best[0]))
    close.sort(key=lambda row: (-row.similarity, row.example_id))
    return LeakageReport(len(examples), tuple(same), tuple(close))


def no_leakage(report: LeakageReport) -> GateResult:
    """The check as a gate: an error when test examples were seen, for then the other gates measure memory."""
    details = {
        "n": report.n,
        "seen": sorted(report.seen_ids),
        "near": [[row.example_id, row.seen_in, row.seen_id, round(row.similarity, 3)] for row in report.near],
    }
    near = f" {counted(len(report.near), 'near-duplicate')} reported, not refused." if report.near else ""
    if not report.same:
        return GateResult(
            "no_leakage", Verdict.PASS, f"none of {counted(report.n, 'example')} was seen.{near}", details
        )
    where = ", ".join(f"{count} in {source}" for source, count in Counter(r.seen_in for r in report.same).items())
    first = report.same[0]
    message = (
        f"{len(report.seen_ids)} of {counted(report.n, 'test example')} were seen by the optimizer or stand in the "
        f"prompt ({where}; first: {first.example_id} is {first.seen_in} {first.seen_id}), so the score measures memory "
        f"and is not judged.{near} Next: remove them from the test split, or split the data again without repeats."
    )
    return GateResult("no_leakage", Verdict.ERROR, message, details)


def normalized(fields: Fields) -> str:
    """An example's inputs as one text that ignores case, punctuation, spacing and the order of fields."""
    return canonical_json({name: " ".join(_tokens(value)) for name, value in fields.items()})


def shingles(fields: Fields) -> frozenset[tuple[str, ...]]:
    """Runs of `SHINGLE` tokens of each field; nothing for texts under `MIN_TOKENS` tokens in all."""
    by_field = [_tokens(value) for _, value in sorted(fields.items())]
    if sum(map(len, by_field)) < MIN_TOKENS:
        return frozenset()
    pieces = set()
    for tokens in by_field:
        for start in range(max(1, len(tokens) - SHINGLE + 1)):
            pieces.add(tuple(tokens[start : start + SHINGLE]))
    return frozenset(pieces)


def _tokens(value: Any) -> Sequence[str]:
    text = value if isinstance(value, str) else canonical_json(value, fallback=repr)
    found = _TOKEN.findall(unicodedata.normalize("NFKC", text).casefold())
    return found or text.split()


def _jaccard(one: frozenset[tuple[str, ...]], other: frozenset[tuple[str, ...]]) -> float:
    union = len(one | other)
    return len(one & other) / union if union else 0.0
