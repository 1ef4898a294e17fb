"""One form of an exported program per module, each with `write(export)`."""

FORMS = {
    "text": "text",
    "messages": "messages",
    "dspy": "dspy_script",
    "openai": "openai_function",
    "peft": "peft_folder",
    "vllm": "vllm_command",
}
"""What may be written, and the module here that does."""
