"""What a prompt step may choose from: `demos` and `instructions`, put together by `proposer`.

`rules` and `similarity` need no model; `writer` asks one, shown what `render` and `reflection` put into words; `schema`
says what the data look like.
"""
