"""Verdicts that may be looked at after every row.

`stopping` runs an evaluation with them; `monitors` watch one rule each, by `betting` (a mean) or `alpha_spending` (an
exact test of right and wrong).
"""
