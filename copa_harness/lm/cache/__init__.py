"""Answers on disk: what a request is called (`keys`), where its answer lies (`store`), who may pay for it (`locks`).

`maintenance` looks after a cache from outside a run.
"""
