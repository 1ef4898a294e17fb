"""A shop assistant with two tools: a ReAct program over a small made price list, with a right or wrong answer.

The price list and the questions are made, by a seed; no data are read. What a question needs stands nowhere but in the
list, so an answer is right only if the tools were used. Tools are asked for in text: `dspy.ReAct` writes their names,
arguments and descriptions into the instruction of its predictor `react` and reads `next_tool_name` and `next_tool_args`
back, so any model answers, local ones too. And whatever proposes instructions proposes descriptions of tools with them.
DSPy is imported when the task is made, not before.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from copa_harness.errors import TaskError
from copa_harness.tasks.task import Task

if TYPE_CHECKING:
    import dspy

PRICES: Mapping[str, int] = {
    "pen": 3,
    "cup": 7,
    "lamp": 24,
    "chair": 58,
    "rope": 11,
    "tent": 96,
    "kettle": 35,
    "mirror": 42,
    "candle": 5,
    "blanket": 29,
    "bucket": 8,
    "clock": 17,
}
"""Dollars by article."""

_LARGEST = 10**9
"""Numbers beyond it are no prices."""

_OPERATORS: Mapping[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}


def calculator(expression: str) -> str:
    """Work out an arithmetic expression of numbers, + - * / and brackets."""
    try:
        return f"{_value(ast.parse(expression.strip(), mode='eval').body):.10g}"
    except (SyntaxError, ValueError, ArithmeticError) as error:
        # DSPy would show the model a traceback, which fills the context of a small one.
        return f"cannot work out {expression!r}: {error}"


def price_of(article: str) -> str:
    """The price of one piece of an article in dollars."""
    name = article.strip().casefold()
    known = PRICES.get(name, PRICES.get(name.removesuffix("s")))
    return f"no article {article!r}; there are {', '.join(PRICES)}" if known is None else str(known)


def _value(node: ast.AST) -> float:
    """What an expression comes to.

    Raises:
        ValueError: It is none of those the tool takes.
    """
    value: float
    if isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        value = node.value
    elif isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        value = _OPERATORS[type(node.op)](_value(node.left), _value(node.right))
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        value = -_value(node.operand)
    else:
        raise ValueError("expected numbers, + - * / and brackets")
    if abs(value) > _LARGEST:
        raise ValueError(f"got a number above {_LARGEST:,}")
    return value


def same_number(example: dspy.Example, prediction: Any, trace: Any = None) -> float:
    """1.0 when the only number in the answer is the example's, with or without a dollar sign; else 0.0."""
    numbers = re.findall(r"-?\d+(?:\.\d+)?", str(prediction.answer).replace(",", ""))
    return float(len(numbers) == 1 and float(numbers[0]) == float(example.answer))


def agent(seed: int = 0, *, n_train: int = 24, n_val: int = 16, n_test: int = 32, max_iters: int = 4) -> Task:
    """What one or two kinds of articles cost together: a `dspy.ReAct` of two tools, `price_of` and `calculator`.

    A model as good as can be takes three to five calls for an answer: up to two prices, the sum, and the answer.

    Args:
        seed: Chooses the questions; the same seed gives the same rows on every machine.
        n_train: Training rows.
        n_val: Validation rows.
        n_test: Test rows.
        max_iters: Tools that may be used for one answer.

    Raises:
        TaskError: More rows are asked for than there are questions.
    """
    import dspy

    questions = _questions(np.random.default_rng(seed), n_test + n_train + n_val)
    rows = [dspy.Example(question=text, answer=str(total)).with_inputs("question") for text, total in questions]
    test, train, val = rows[:n_test], rows[n_test : n_test + n_train], rows[n_test + n_train :]  # test rows stay
    signature = dspy.Signature("question -> answer", "Say what a customer has to pay, as a number of dollars.")
    return Task(
        "agent",
        dspy.ReAct(signature, tools=[price_of, calculator], max_iters=max_iters),
        same_number,
        train,
        val,
        test,
        description="what articles of a price list cost, with two tools",
    )


def _questions(rng: np.random.Generator, n: int) -> list[tuple[str, int]]:
    """So many different questions with their answers.

    Raises:
        TaskError: There are not so many.
    """
    names, most = list(PRICES), len(PRICES) * 9 * (1 + (len(PRICES) - 1) * 9)
    if n > most // 2:
        raise TaskError(f"agent: asked for {n} rows; expected at most {most // 2} of them")
    found: dict[str, int] = {}
    while len(found) < n:
        kinds = [names[i] for i in rng.choice(len(names), size=int(rng.integers(1, 3)), replace=False)]
        counts = [int(count) for count in rng.integers(2, 10, size=len(kinds))]
        wanted = " and ".join(f"{count} {kind}s" for count, kind in zip(counts, kinds, strict=True))
        found[f"What do {wanted} cost{' together' if len(kinds) > 1 else ''}?"] = sum(
            count * PRICES[kind] for count, kind in zip(counts, kinds, strict=True)
        )
    return list(found.items())
