"""Texts and configurations that are published. Oracle: the paths that were put in, none of which may come out."""

from __future__ import annotations

import json

import pytest

from loftq.hub.public import public_json, without_homes, without_paths


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("made from /home/me/models/llama, on text", "made from llama, on text"),
        ("`/Users/me/x/` and '/root/y'", "`x` and 'y'"),
        ("file:///home/me/data.txt", "data.txt"),
        (r"in C:\Users\me\models\llama now", "in llama now"),
        ("https://hub.example/home/me/x", "https://hub.example/home/me/x"),
        ("a/home/me and /rooted/x", "a/home/me and /rooted/x"),
    ],
)
def test_home_folders_in_a_text(text: str, public: str) -> None:
    assert without_homes(text) == public


def test_the_home_of_this_user_wherever_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/mnt/people/me")
    assert without_homes("from /mnt/people/me/models/x") == "from x"
    assert without_homes("from /mnt/people/meg/x") == "from /mnt/people/meg/x"
    monkeypatch.setenv("HOME", "/")
    assert without_homes("from /mnt/x") == "from /mnt/x"


def test_paths_in_a_configuration() -> None:
    config = {
        "_name_or_path": "/data/models/llama",
        "auto": [{"cache_dir": "~/cache/x", "other": "/home/me/x/y"}],
        "tokenizer_file": "/opt/t.json",
        "name_or_path": "owner/name",
        "id2label": {"0": "/home/a/b"},
        "eos_token": "/home/me/x",
        "hidden_act": "silu",
        "layers": 5,
    }
    public = without_paths(config)
    assert public == config | {
        "_name_or_path": "llama",
        "auto": [{"cache_dir": "x", "other": "y"}],
        "tokenizer_file": "t.json",
    }


def test_a_file_without_paths_keeps_its_bytes() -> None:
    plain = b'{"b": 1,   "a": "x"}'
    assert public_json("config.json", plain) == plain
    assert public_json("tokenizer.json", b'{"_name_or_path": "/home/me/x"}') == b'{"_name_or_path": "/home/me/x"}'
    assert public_json("config.json", b"no json") == b"no json"
    assert json.loads(public_json("x/config.json", b'{"_name_or_path": "/home/me/x"}')) == {"_name_or_path": "x"}
