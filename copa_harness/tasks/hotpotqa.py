"""HotPotQA: questions that take two documents to answer, by a program of three predictors without labels in between.

Yang et al. 2018, "HotpotQA: A Dataset for Diverse, Explainable Multi-hop Question Answering" (EMNLP), CC BY-SA 4.0. The
program is that of BetterTogether (Soylu et al. 2024, arXiv 2407.10930): a search query from the question, a second one
from the question and the first passages, then the answer, each by chain of thought. There are no gold queries: both
weights and demonstrations learn from the program's own passing traces. Passages are found by BM25 among all paragraphs
at hand, which for a file are those of all its rows. Nothing is shipped: `hotpotqa(path=...)` reads a file, and without
one the validation split of `hotpotqa/hotpot_qa` (`distractor`) is loaded by `datasets`.
DSPy and `bm25s` are imported when the task is made, not before.
"""

from __future__ import annotations

import os
import re
import string
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from copa_harness.documents import hash_json
from copa_harness.errors import TaskError
from copa_harness.tasks.rows import draw_groups, from_hub, read_rows
from copa_harness.tasks.task import Task

if TYPE_CHECKING:
    import dspy

FILE_VARIABLE = "COPA_HOTPOTQA"
"""Environment variable with the path of the file, where no path is given."""

_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(answer: object) -> str:
    """Lower case, without punctuation, articles and superfluous blanks, as the official script has it."""
    text = str(answer).lower().translate(_PUNCTUATION)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split())


def answer_match(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
    """1.0 when the answers are equal after normalization, else 0.0: the official exact match."""
    return float(normalized(prediction.answer) == normalized(example.answer))


def answer_f1(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
    """Harmonic mean of precision and recall of the answer's tokens, 0..1: the official F1.

    yes, no and noanswer are right or wrong as a whole.
    """
    said, gold = normalized(prediction.answer), normalized(example.answer)
    if said != gold and {said, gold} & {"yes", "no", "noanswer"}:
        return 0.0
    n_common = sum((Counter(said.split()) & Counter(gold.split())).values())
    return 2.0 * n_common / (len(said.split()) + len(gold.split())) if n_common else 0.0


def hotpotqa(
    path: Path | str | None = None,
    *,
    seed: int = 0,
    n_train: int = 40,
    n_val: int = 20,
    n_test: int = 40,
    n_passages: int = 3,
    metric: Literal["exact", "f1"] = "exact",
) -> Task:
    """The answer to a question by way of two searches; three predictors.

    Questions whose supporting documents are connected lie in one split, and count as one group in intervals.

    Args:
        path: Rows as `datasets` or the authors' script gives them (question, answer, supporting_facts, context), JSONL
            or JSON; by default what the environment variable `COPA_HOTPOTQA` names, else the public data set.
        seed: Chooses the rows; the same seed gives the same rows on every machine.
        n_train: Training rows.
        n_val: Validation rows.
        n_test: Test rows.
        n_passages: Passages each of the two searches finds.
        metric: `exact`, right or wrong (`answer_match`), or `f1`, graded (`answer_f1`).

    Raises:
        TaskError: The data cannot be had or read, there are fewer rows than asked for, or `bm25s` is not installed.
    """
    import dspy

    if metric not in ("exact", "f1"):
        raise TaskError(f"hotpotqa: metric: got {metric!r}, expected 'exact' or 'f1'")
    if path := path or os.environ.get(FILE_VARIABLE):
        raw = read_rows(Path(path), task="hotpotqa", fields=("question", "answer", "supporting_facts", "context"))
    else:
        ways = f"path=... or the environment variable {FILE_VARIABLE} with its rows as JSONL"
        raw = from_hub("hotpotqa/hotpot_qa", "distractor", task="hotpotqa", file=ways)["validation"]
    questions = [_question(row) for row in raw]
    group_of = _connected(questions)
    splits = draw_groups(
        questions,
        lambda one: group_of[one.text],
        {"test": n_test, "train": n_train, "val": n_val},  # test rows stay when others change
        rng=np.random.default_rng(seed),
        task="hotpotqa",
    )
    examples = {
        split: [dspy.Example(question=one.text, answer=one.answer).with_inputs("question") for one in drawn]
        for split, drawn in splits.items()
    }
    passages = list(dict.fromkeys(passage for one in questions for passage in one.passages))
    return Task(
        "hotpotqa",
        two_hop_program(passages, n_passages=n_passages),
        answer_match if metric == "exact" else answer_f1,
        examples["train"],
        examples["val"],
        examples["test"],
        description=f"a question over two of {len(passages):,} passages",
        group=lambda example: group_of[example.question],
    )


def two_hop_program(passages: Sequence[str], *, n_passages: int) -> dspy.Module:
    """The program of `hotpotqa` over passages: predictors `first_query`, `second_query` and `answer`.

    Raises:
        TaskError: `bm25s` is not installed.
    """
    import dspy

    class TwoHop(dspy.Module):
        """Search, search again knowing what was found, answer."""

        def __init__(self) -> None:
            super().__init__()
            self.first_query = dspy.ChainOfThought(
                dspy.Signature(
                    "question -> query", "Write a search query that finds a document to answer the question."
                )
            )
            self.second_query = dspy.ChainOfThought(
                dspy.Signature(
                    "question, passages: list[str] -> query",
                    "Write a search query that finds what the passages still lack to answer the question.",
                )
            )
            self.answer = dspy.ChainOfThought(
                dspy.Signature(
                    "question, passages: list[str] -> answer",
                    "Answer the question by the passages, with a name, a date, a few words, or yes or no.",
                )
            )
            self.search = _search(passages, n_passages=n_passages)

        def forward(self, question: str) -> dspy.Prediction:
            found = self.search(self.first_query(question=question).query)
            found += self.search(self.second_query(question=question, passages=found).query)
            answered: dspy.Prediction = self.answer(question=question, passages=list(dict.fromkeys(found)))
            return answered

    return TwoHop()


def _search(passages: Sequence[str], *, n_passages: int) -> Callable[[object], list[str]]:
    """BM25 over the passages: the best ones for a query, ties in the order of the passages."""
    try:
        import bm25s
    except ImportError as error:
        raise TaskError(
            "hotpotqa: the package bm25s, which searches the passages, is not installed; "
            "pip install bm25s, or pip install 'copa-harness[tasks]'"
        ) from error
    from dspy.predict.parameter import Parameter

    def words(text: str) -> list[str]:
        (found,) = bm25s.tokenize([text], token_pattern=r"\w+", return_ids=False, show_progress=False)
        return list(found)

    index = bm25s.BM25()
    index.index([words(passage) for passage in passages], show_progress=False)
    digest = hash_json(list(passages))

    class Search(Parameter):
        """A part of the program's state: other passages make another program, whose results are kept apart."""

        def __call__(self, query: object) -> list[str]:
            asked = words(str(query))
            scores = index.get_scores(asked) if asked else np.zeros(len(passages))
            return [passages[i] for i in np.argsort(-scores, kind="stable")[:n_passages]]

        def __deepcopy__(self, memo: Any) -> Search:
            return self

        def reset(self) -> None:
            """There is nothing to learn."""

        def dump_state(self, json_mode: bool = True) -> dict[str, Any]:
            """Which passages, and how many are found."""
            return {"passages": digest, "n_passages": n_passages}

        def load_state(self, state: Mapping[str, Any]) -> None:
            """A stored program may be put over other passages."""

    return Search()


@dataclass(frozen=True, slots=True)
class _Question:
    text: str
    answer: str
    titles: tuple[str, ...]
    passages: tuple[str, ...]


def _question(row: Mapping[str, Any]) -> _Question:
    """A row of `datasets` (a mapping of lists) or of the authors' file (a list of pairs)."""
    try:
        context, facts = row["context"], row["supporting_facts"]
        pairs = zip(context["title"], context["sentences"], strict=True) if isinstance(context, Mapping) else context
        titles = facts["title"] if isinstance(facts, Mapping) else [title for title, _ in facts]
        passages = tuple(f"{title} | {''.join(sentences)}" for title, sentences in pairs)
        return _Question(str(row["question"]), str(row["answer"]), tuple(dict.fromkeys(titles)), passages)
    except (KeyError, TypeError, ValueError) as error:
        raise TaskError(
            f"hotpotqa: got a row without titles and sentences ({type(error).__name__}: {error}): {str(row)[:160]}; "
            "expected rows of the distractor setting"
        ) from error


def _connected(questions: Sequence[_Question]) -> dict[str, str]:
    """Question -> a title that stands for all documents connected with its own by questions that need both."""
    parents: dict[str, str] = {}

    def root(title: str) -> str:
        while parents.setdefault(title, title) != title:
            title = parents[title]
        return title

    for one in questions:
        for title in one.titles:
            parents[root(title)] = root(one.titles[0])
    return {one.text: root(one.titles[0]) if one.titles else one.text for one in questions}
