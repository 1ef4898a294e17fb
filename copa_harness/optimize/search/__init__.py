"""The study over weights and prompts: its `space` of `candidate`s, its trials (`study`), and how they are raced.

`scoring` scores candidates block by block, `racing` ends hopeless trials, `samplers` are Optuna's, `trial_memory` keeps
what the trials taught and `bandit` learns from it which proposals pay, `credit` says which parts of the winner earned
its gain, `journal` keeps everything on disk.
"""
