"""The lines of a chat: which of them are commands, what each does, and what Ctrl-C does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from loftq.errors import LoftQError

if TYPE_CHECKING:
    from loftq.training.chat import Chat  # imports transformers, which takes seconds

COMMANDS = {
    "/reset": "forget the conversation, but not the system message",
    "/system TEXT": "set the system message; without TEXT, remove it",
    "/save FILE": "save the conversation as a row that `loftq train` reads",
    "/help": "show these commands",
    "/exit": "leave; so does Ctrl-D, or Ctrl-C twice",
}
HELP = "\n".join(
    [
        *(f"{name:<14} {meaning}" for name, meaning in COMMANDS.items()),
        "Ctrl-C stops an answer. A line that ends with \\ continues on the next line.",
    ]
)


class Session:
    """Reads lines and answers them until the input ends. `say` shows a line of ours, `stream` the model's answers."""

    def __init__(
        self, chat: Chat, read: Callable[[str], str], say: Callable[[str], None], stream: TextIO, *, patient: bool
    ) -> None:
        self._chat, self._read, self._say, self._stream = chat, read, say, stream
        self._patient = patient  # a person may press Ctrl-C again; a script gets no second chance
        self.refused = False

    def run(self) -> None:
        """Answer lines until /exit, the end of the input, or Ctrl-C twice."""
        interrupted = False
        while True:
            try:
                line = self._line()
                interrupted = False
                if not line.strip():
                    continue
                if line.split()[0] == "/exit":
                    return
                self._obey(line.strip())
            except EOFError:
                return
            except KeyboardInterrupt:
                if interrupted or not self._patient:
                    raise
                interrupted = True
                self._say("\nCtrl-C again leaves, and so does /exit.")
            except LoftQError as error:
                self.refused = True
                self._say(f"Error: {error}")

    def _line(self) -> str:
        """A line of the user, with those that continue it."""
        line = self._read("> ")
        while line.endswith("\\"):
            line = f"{line[:-1]}\n{self._read('. ')}"
        return line

    def _obey(self, line: str) -> None:
        word, _, rest = line.partition(" ")
        rest = rest.strip()
        if not line.startswith("/"):
            note = self._chat.ask(line, self._stream)
            if note:
                self._say(f"({note})")
        elif word == "/reset":
            self._chat.reset()
            self._say("The conversation is empty.")
        elif word == "/system":
            self._chat.system = rest or None
            self._say("The system message is set." if rest else "There is no system message.")
        elif word == "/save" and rest:
            self._chat.save(Path(rest))
            self._say(f"Saved to {rest}.")
        elif word == "/save":
            self._say("/save needs the name of a file.")
        else:
            self._say(HELP if word == "/help" else f"There is no command {word}.\n{HELP}")
