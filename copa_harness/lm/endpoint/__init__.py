"""Models behind an endpoint: connections (`transport`), requests and answers (`engine`), and vLLM servers.

`vllm_server` sees a server as a shelf of LoRA adapters; `vllm` is the engine that fills it; `replicas` spreads requests
over several servers of one model.
"""
