import pytest

from copa_harness.credentials import find_credential, is_secret_key, mask_secrets, mask_text


@pytest.mark.parametrize(
    "key",
    [
        "api_key",
        "API-KEY",
        "apiKey",
        "OPENAI_API_KEY",
        "hf_token",
        "Authorization",
        "aws_secret_access_key",
        "password",
        "x-api-key",
        "authToken",
        "bearer",
    ],
)
def test_names_of_credentials_are_known(key):
    assert is_secret_key(key)


@pytest.mark.parametrize(
    "key",
    [
        "input_tokens",
        "max_tokens",
        "tokens",
        "eos_token",
        "pad_token_id",
        "token_count",
        "tokenizer",
        "key",
        "keyboard",
        "author",
        "monkey",
        "primary_key",
        "example_id",
        "passed",
    ],
)
def test_names_of_other_things_are_left_alone(key):
    assert not is_secret_key(key)


def test_credentials_are_masked_by_key_and_by_look():
    masked = mask_secrets({"lm": {"api_key": "x", "model": "m"}, "list": ["sk-abcdefghijklmnop1234"], "token": ""})
    assert masked == {"lm": {"api_key": "***", "model": "m"}, "list": ["***"], "token": ""}
    assert mask_text("Authorization: Bearer abcdef123456789") == "Authorization: Bearer ***"
    assert mask_text("a risk-averse-and-long-hyphenated-word") == "a risk-averse-and-long-hyphenated-word"


def test_a_credential_is_found_with_its_place():
    assert find_credential({"a": [{"api_key": "abcd1234efgh5678"}]}) == "a > 0 > api_key"
    assert find_credential({"demos": [{"token": "Paris"}]}) is None
