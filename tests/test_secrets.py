"""Secrets in names, texts and errors. Oracle: the secret itself, which must not be found in what comes out."""

from __future__ import annotations

import pytest

from loftq.errors import HubError, UnknownNameError
from loftq.secrets import find_secret, is_secret_name, redacted

SECRET = "hf_AbCdEfGhIjKlMnOpQrSt"


@pytest.mark.parametrize(
    "text",
    [
        f"403 for https://alice:{SECRET}@hub.example/x",
        "cannot reach http://alice:pass%40word@hub.example:8080/api",
        f"Authorization: Bearer {SECRET}",
        "Authorization: bearer eyJhbGciOiJIUzI1NiJ9.e30",
        f"set = 'hub_token={SECRET}': expected a table",
        "hub_token=pass%40word",
        '{"api_key": "pass%40word"}',
        "WANDB_API_KEY=pass%40word",
        "https://bucket.example/x?X-Amz-Signature=pass%40word&Expires=1",
        f"invalid header value b'{SECRET}'",
    ],
)
def test_a_secret_in_a_text_is_hidden(text: str) -> None:
    for shown in (redacted(text), str(HubError(text)), str(UnknownNameError("name", text, ["other"]))):
        assert not any(secret in shown for secret in (SECRET, "pass%40word", "eyJhbGci")), shown
        assert "***" in shown


@pytest.mark.parametrize(
    "text",
    [
        "the Hub refuses the token: log in again with `hf auth login`, or pass another --token",
        "see hf_hub_download and https://huggingface.co/settings/tokens",
        "--calibration-tokens=4096: 512 of 600 tokens, mail alice@hub.example",
    ],
)
def test_other_texts_stay(text: str) -> None:
    assert redacted(text) == text


def test_the_token_of_the_environment_is_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "a token of another form")
    assert redacted("refused: a token of another form!") == "refused: ***!"


def test_names_of_secrets() -> None:
    secret = [
        "hub_token",
        "push_to_hub_token",
        "api_key",
        "apiKey",
        "AWS_SECRET_ACCESS_KEY",
        "db-password",
        "accessToken",
    ]
    plain = ["average_tokens_across_devices", "include_num_input_tokens_seen", "pad_token", "key", "tokenizer", "seed"]
    assert [is_secret_name(name) for name in secret] == [True] * len(secret)
    assert [is_secret_name(name) for name in plain] == [False] * len(plain)


def test_a_secret_is_found_at_any_depth() -> None:
    assert find_secret({"a": {"b": [{"hub_token": 5}]}}) == "a.b.hub_token"
    assert find_secret({"run_name": f"try {SECRET}"}) == "run_name"
    assert find_secret({"hub_token": None, "tf32": True, "optim_args": "a=1", "logging_steps": 5}) is None
