"""The Modelfile from which Ollama makes a model of a GGUF file: template, parameters, and what ends a turn.

Ollama's templates are Go templates. That of a model is written if its chat template only puts fixed texts around each
message: the texts are read off renderings of the chat template, and the result must render a longer conversation to the
same text. Otherwise Ollama chooses a template by that in the GGUF file.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from loftq.errors import LoftQError
from loftq.formats.schema import read_json
from loftq.models.tokenizers import read_tokenizer

MODELFILE = "Modelfile"
_ROLES = ("system", "user", "assistant")
_PARAMETERS = {  # in generation_config.json, and for Ollama
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "min_p": "min_p",
    "repetition_penalty": "repeat_penalty",
}


@dataclass(frozen=True)
class ChatTexts:
    """The texts before and after the content of each role's messages, before all without a system message, and last."""

    around: dict[str, tuple[str, str]]
    first: str
    last: str

    def render(self, messages: list[dict[str, str]]) -> str:
        """The text of a conversation that the model continues."""
        first = "" if messages[0]["role"] == "system" else self.first
        parts = (self.around[m["role"]][0] + m["content"] + self.around[m["role"]][1] for m in messages)
        return first + "".join(parts) + self.last

    def go(self) -> str:
        """The Go template that renders the same."""
        cases = "".join(
            f'{{{{ {word} eq .Role "{role}" }}}}{_go(before)}{{{{ .Content }}}}{_go(after)}'
            for word, (role, (before, after)) in zip(("if", "else if", "else if"), self.around.items(), strict=True)
        )
        first = f'{{{{ if ne (index .Messages 0).Role "system" }}}}{_go(self.first)}{{{{ end }}}}' if self.first else ""
        return f"{first}{{{{ range .Messages }}}}{cases}{{{{ end }}}}{{{{ end }}}}{_go(self.last)}"


def modelfile(folder: Path, file: str) -> str:
    """The text of the Modelfile for a GGUF file, from the tokenizer and the settings in the folder of the model."""
    lines = [f"FROM ./{file}"]
    ends: list[str] = []
    try:
        tokenizer = read_tokenizer(folder)
    except LoftQError:
        return lines[0] + "\n"
    texts = chat_texts(tokenizer)
    if texts is not None:
        lines.append(f'TEMPLATE """{texts.go()}"""')
        ends.append(texts.around["assistant"][1].strip())
    path = folder / "generation_config.json"
    settings: dict[str, Any] = read_json(path, {}, foreign=True) if path.is_file() else {}
    ids = settings.get("eos_token_id", tokenizer.eos_token_id)
    for token in ids if isinstance(ids, list) else [ids]:
        if isinstance(token, int):
            ends.append(str(tokenizer.convert_ids_to_tokens(token)))
    lines += [
        f"PARAMETER {name} {settings[key]:g}"
        for key, name in _PARAMETERS.items()
        if isinstance(settings.get(key), (int, float)) and not isinstance(settings[key], bool)
    ]
    lines += [f'PARAMETER stop "{end}"' for end in dict.fromkeys(ends) if end and '"' not in end and "\n" not in end]
    return "\n".join(lines) + "\n"


def chat_texts(tokenizer: Any) -> ChatTexts | None:
    """The fixed texts of a chat template; None if it has none, or if they do not say all of it."""
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        texts = _read_off(tokenizer)
        long = [_message(role, f"{role} {i} said") for i, role in enumerate(("user", "assistant", "user"))]
        for messages in (long, [_message("system", "be brief"), *long], long[:1]):
            if texts is None or texts.render(messages) != _rendered(tokenizer, messages, True):
                return None
    except Exception:  # a chat template may raise any exception, also for roles that it does not take
        return None
    return texts if texts is not None and '"""' not in texts.go() else None


def _read_off(tokenizer: Any) -> ChatTexts | None:
    marks = {role: f"\u2021{role}\u2021" for role in _ROLES}
    conversation = [_message(role, marks[role]) for role in (*_ROLES, "user")]
    whole, prompt = (_rendered(tokenizer, conversation, generate) for generate in (False, True))
    alone = _rendered(tokenizer, conversation[1:2], False)
    if not prompt.startswith(whole) or whole.count(marks["user"]) != 2:
        return None
    before_system, _, rest = whole.partition(marks["system"])
    after_system, _, rest = rest.partition(marks["user"])
    after_user, _, rest = rest.partition(marks["assistant"])
    after_assistant, _, after_last = rest.partition(marks["user"])
    # The text between two messages ends with what introduces the second: what follows the last user is its end alone.
    if not after_user.startswith(after_last):
        return None
    user_end, assistant_start = after_last, after_user[len(after_last) :]
    user_start = _common_end(after_system, after_assistant, alone.partition(marks["user"])[0])
    user_start = user_start.removeprefix(user_end)  # all of these texts may begin with the end of a turn
    first = alone.partition(marks["user"])[0].removesuffix(user_start)
    around = {
        "system": (before_system, after_system.removesuffix(user_start)),
        "user": (user_start, user_end),
        "assistant": (assistant_start, after_assistant.removesuffix(user_start)),
    }
    return ChatTexts(around, first, prompt[len(whole) :])


def _common_end(*texts: str) -> str:
    """The longest end that texts share, from the last place on at which a turn can begin."""
    shortest = min(texts, key=len)
    length = next((i for i in range(len(shortest), 0, -1) if all(text.endswith(shortest[-i:]) for text in texts)), 0)
    return shortest[len(shortest) - length :]


def _rendered(tokenizer: Any, messages: list[dict[str, str]], generate: bool) -> str:
    text = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=generate))
    start = tokenizer.bos_token or ""
    return text.removeprefix(start) if start and not text.startswith(f"{start}system") else text


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _go(text: str) -> str:
    """A fixed text within a Go template."""
    return text.replace("{{", '{{ "{{" }}')
