"""llama.cpp beside the other rows of `bench_engine.py`: the same random Llama weights, as a GGUF file.

Needs `llama-cpp-python` and `gguf`, which are no dependencies of this project: `pip install` them anywhere on the
import path (the first is compiled from source, for 15 to 35 minutes on two cores). Used as llama.cpp's own server does:
the shared prefix is computed once into sequence 0, its states are shared by copies (one unified cache), and up to
`AT_ONCE` requests are decoded together, all their suffixes in one batch. Greedy; weights and states in float32 (states
in float16, llama.cpp's default, took as long). States are allocated beforehand: the column of memory leaves them out.
"""

from __future__ import annotations

import ctypes
import importlib.util
from pathlib import Path

import numpy as np

AT_ONCE = 64
"""Requests decoded together. At 2M and one thread 16 took 30 ms per request, 32 took 32, 64 took 22, 128 took 23 to 32;
without flash attention 64 took 70, with 2,048 tokens per step of computation (not 512) 28."""
BATCH_TOKENS = 2048
"""Most tokens handed over in one call."""


def missing() -> list[str]:
    """Packages this row needs and that are not there."""
    wanted = {"llama_cpp": "llama-cpp-python", "gguf": "gguf"}
    return [name for module, name in wanted.items() if importlib.util.find_spec(module) is None]


def write_gguf(model, path: Path) -> Path:
    """A Hugging Face Llama model as a GGUF file in float32, without a vocabulary."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("no_vocab")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    tied = config.tie_word_embeddings
    for name, tensor in model.state_dict().items():
        if tied and name == "lm_head.weight":
            continue
        values = tensor.float().numpy()
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            n_heads = config.num_attention_heads if "q_proj" in name else config.num_key_value_heads
            values = _for_interleaved_rope(values, n_heads)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _for_interleaved_rope(weight, n_heads):
    """llama.cpp rotates neighbouring dimensions, transformers the two halves of a head."""
    n_out, n_in = weight.shape
    return weight.reshape(n_heads, 2, n_out // n_heads // 2, n_in).swapaxes(1, 2).reshape(n_out, n_in)


class LlamaCpp:
    """A model in llama.cpp.

    Args:
        path: GGUF file.
        threads: for prompts and for generation.
        n_prefix: tokens of the shared prefix.
        n_own: most tokens of a request beyond it, prompt and answer.
    """

    def __init__(self, path: Path, *, threads: int, n_prefix: int, n_own: int) -> None:
        import llama_cpp

        self._c = llama_cpp
        self._quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
        llama_cpp.llama_log_set(self._quiet, ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self._model:
            raise RuntimeError(f"llama.cpp does not load {path}")
        given = llama_cpp.llama_context_default_params()
        given.n_ctx = n_prefix + AT_ONCE * n_own
        given.n_batch, given.n_ubatch = BATCH_TOKENS, 512
        given.n_seq_max = AT_ONCE + 1
        given.n_threads = given.n_threads_batch = threads
        given.type_k = given.type_v = llama_cpp.GGML_TYPE_F32
        given.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        given.kv_unified = True
        given.no_perf = True
        self._context = llama_cpp.llama_init_from_model(self._model, given)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context of this size")
        self._memory = llama_cpp.llama_get_memory(self._context)
        self._n_vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(given.n_batch, 0, 1)

    def close(self) -> None:
        """Free everything."""
        self._c.llama_batch_free(self._batch)
        self._c.llama_free(self._context)
        self._c.llama_model_free(self._model)

    def answers(self, work) -> list[list[int]]:
        """Every request of the workload, answered greedily; nothing is known when it begins."""
        self._c.llama_memory_clear(self._memory, True)
        self._decode([(token, place, 0, False) for place, token in enumerate(work.prefix)])
        found: list[list[int]] = []
        for start in range(0, len(work), AT_ONCE):
            indices = range(start, min(start + AT_ONCE, len(work)))
            found += self._together([work.suffixes[i] for i in indices], [work.n_new[i] for i in indices], work.prefix)
        return found

    def _together(self, suffixes, limits, prefix):
        answers: list[list[int]] = [[] for _ in suffixes]
        items = []
        for row, suffix in enumerate(suffixes):
            self._c.llama_memory_seq_cp(self._memory, 0, row + 1, -1, -1)
            items += [(token, len(prefix) + n, row + 1, n == len(suffix) - 1) for n, token in enumerate(suffix)]
        while items:
            chosen = self._decode(items)
            items = []
            for sequence, token in chosen:
                row = sequence - 1
                answers[row].append(token)
                if len(answers[row]) < limits[row]:
                    place = len(prefix) + len(suffixes[row]) + len(answers[row]) - 1
                    items.append((token, place, sequence, True))
        for row in range(len(suffixes)):
            self._c.llama_memory_seq_rm(self._memory, row + 1, -1, -1)
        return answers

    def _decode(self, items):
        """Run (token, position, sequence, whether its logits are wanted); the likeliest next token of each wanted."""
        chosen = []
        for start in range(0, len(items), BATCH_TOKENS):
            part = items[start : start + BATCH_TOKENS]
            self._batch.n_tokens = len(part)
            for n, (token, place, sequence, wanted) in enumerate(part):
                self._batch.token[n], self._batch.pos[n] = token, place
                self._batch.n_seq_id[n], self._batch.seq_id[n][0] = 1, sequence
                self._batch.logits[n] = wanted
            if (status := self._c.llama_decode(self._context, self._batch)) != 0:
                raise RuntimeError(f"llama_decode gave {status}")
            for n, (_, _, sequence, wanted) in enumerate(part):
                if wanted:
                    logits = np.ctypeslib.as_array(self._c.llama_get_logits_ith(self._context, n), (self._n_vocab,))
                    chosen.append((sequence, int(logits.argmax())))
        return chosen
