"""Where a local model comes from: a name becomes a model folder in safetensors.

`names` (what may stand after `--copa-lm` for a model in this process, and the table of short names), `source` (a
folder, a file or an id of the Hugging Face hub, and what can be told of it before it is read), `gguf` and `pickled`
(other formats, rewritten once), `gguf_lora` (the way back for an adapter), `keeping` (how a rewritten folder comes to
be whole or not at all).
"""
