"""Tiny random models on disk: a test double for local models, as `ScriptedLM` is for any model.

`write_tiny_model` writes a folder that loads like any Hugging Face model, in a fraction of a second and a few hundred
kilobytes. Its answers are noise, but they depend on every token of the prompt, and LoRA training changes them. For
tests of what needs a model in this process: an engine, a chat template, a training.

    from copa_harness.lm.local.engine import TransformersEngine
    from copa_harness.testing.tiny_models import write_tiny_model

    @pytest.fixture(scope="session")
    def tiny(tmp_path_factory):
        return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny")

    def test_my_template_is_served(tiny, tmp_path):
        engine = TransformersEngine(tiny, name="hf:tiny", lora_dir=tmp_path, chat_template=MY_TEMPLATE)
        assert engine.complete(request, seed=0).message.text
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from copa_harness.errors import ConfigurationError

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ '<|end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)

_SAMPLE_TEXT = (
    "[[ ## question ## ]] [[ ## answer ## ]] [[ ## reasoning ## ]] [[ ## features ## ]] [[ ## label ## ]] "
    "[[ ## completed ## ]]\nRespond with the corresponding output fields, starting with the field "
    "`[[ ## answer ## ]]`, "
    "and then ending with the marker for `[[ ## completed ## ]]`. Your input fields are: Your output fields are: "
    "All interactions will be structured in the following way, with the appropriate values filled in. "
    "In adhering to this structure, your objective is: 0.1 2.3 4.5 6.7 8.9"
)

_SIZES: dict[str, dict[str, Any]] = {
    "llama": {"intermediate_size": 64, "num_key_value_heads": 2},
    "qwen2": {"intermediate_size": 64, "num_key_value_heads": 2},
    "qwen3": {"intermediate_size": 64, "num_key_value_heads": 2, "head_dim": 16},
    "gpt2": {"n_inner": 64},
    "gpt_neox": {"intermediate_size": 64},
    "mistral": {"intermediate_size": 64, "num_key_value_heads": 2, "sliding_window": 24},
    "gemma3_text": {"intermediate_size": 64, "num_key_value_heads": 2, "sliding_window": 24, "head_dim": 8},
    "lfm2": {
        "intermediate_size": 64,
        "num_key_value_heads": 4,
        "conv_L_cache": 4,
        "block_auto_adjust_ff_dim": False,
        "layer_types": ["conv", "full_attention"],
    },
}

ARCHITECTURES = tuple(_SIZES)
"""Architectures `write_tiny_model` can write."""


def write_tiny_model(
    directory: Path,
    *,
    architecture: str = "llama",
    seed: int = 0,
    context_length: int = 2048,
    chat_template: str | None = CHAT_TEMPLATE,
) -> Path:
    """Write a random two-layer model of width 32 with a byte-level tokenizer of 384 pieces.

    Args:
        directory: where to; created.
        architecture: one of `ARCHITECTURES`.
        seed: of the weights.
        context_length: tokens the model can hold.
        chat_template: Jinja text, or None for a model without one.

    Returns:
        `directory`.

    Raises:
        ConfigurationError: the architecture is not one of `ARCHITECTURES`.
    """
    import torch
    import transformers

    if architecture not in _SIZES:
        raise ConfigurationError(f"got architecture {architecture!r}; expected one of {', '.join(ARCHITECTURES)}")
    tokenizer = _tokenizer()
    tokenizer.chat_template = chat_template
    config = transformers.AutoConfig.for_model(
        architecture,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        vocab_size=len(tokenizer),
        max_position_embeddings=context_length,
        initializer_range=0.2,
        tie_word_embeddings=architecture != "gpt_neox",
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **_SIZES[architecture],
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(config)
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return Path(directory)


def _tokenizer() -> Any:
    import transformers
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    special = ["<|pad|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        [_SAMPLE_TEXT],
        trainers.BpeTrainer(
            vocab_size=384,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<|pad|>", eos_token="<|end|>", padding_side="left"
    )
