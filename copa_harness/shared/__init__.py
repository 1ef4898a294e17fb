"""What several machines share: one PostgreSQL database instead of this machine's cache directory.

`database` is the connection, who lives, and rows that one process makes while the others wait; `answers`, `ledger` and
`stages` put what `lm/cache`, `lm/budget` and `store` keep on disk into it. Needs the extra `copa-harness[shared]`.
"""
