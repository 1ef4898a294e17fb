"""Hugging Face models in this process.

Read in the order of a request: `engine` (a request to rules and back), `chat_template` and `tokenizer` (messages to
tokens), `scheduler` (requests to batches), `executor` (a batch to tokens, by `decoding` over `attention` and
`prefix_cache`), `constrained` (choosing among labels). `model` loads one, from `files`; `llama` computes Llama-like
ones; `devices` says where it runs, `memory` what fits there.
"""
