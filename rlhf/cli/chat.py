"""`rlhf chat`: a dialogue with a model in the terminal, token by token. Lines come from anywhere, so a pipe works as well.

Whom one talks to is known at once; the frameworks and the weights are loaded behind the first question.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf import config
from rlhf.errors import UserError
from rlhf.workspace.find import workspace

if TYPE_CHECKING:
    from rlhf.cli.speaker import Message, Speaker
    from rlhf.registry import Version

HELP = """\
/reset   forget the dialogue
/help    this list
/quit    end; Ctrl-D as well
Ctrl-C   cut an answer short
"""


@dataclass(frozen=True)
class Partner:
    """A model to talk to: what to call it, and its folder."""

    name: str
    folder: Path


def choose(model: str | None) -> Partner:
    """Find a model: a folder, models:/…, the number or an alias of a version; by default the champion, or else the candidate.

    Raises:
        UserError: there is none, or it is not the folder of a language model.
    """
    if model and not model.isdecimal() and not model.startswith("models:/") and (os.sep in model or Path(model).is_dir()):
        return _checked(Partner(model, Path(model)))
    from rlhf import registry

    root = workspace()
    params = config.load(root / "params.yaml")
    if model and model.startswith("models:/"):
        return _checked(Partner(model, registry.model_folder(model, root, params)))
    known = registry.aliases(root, params)
    if model and not model.isdecimal() and model not in known:
        what = f"{model}: no such folder, and neither the number of a version of {params.promote.model} nor an alias"
        raise UserError(what, remedy="`rlhf models` lists the versions; a folder is one of a language model, for example models/ppo")
    name = model or next((alias for alias in ("champion", "candidate") if alias in known), None)
    if name is None:
        what = f"{params.promote.model}: no version is champion or candidate yet"
        raise UserError(what, remedy="`rlhf run` trains and registers one; `rlhf chat --model models/sft` talks to a folder")
    version = registry.resolve(root, params, name)
    title = _title(version) + (": no version is champion" if "champion" not in known and not model else "")
    return _checked(Partner(title, registry.model_folder(version.uri, root, params)))


def _title(version: Version) -> str:
    said = [*version.aliases, f"gates {version.tags.get('gates', 'not checked')}"]
    return f"{version.model} version {version.number} ({'; '.join(said)})"


def _checked(partner: Partner) -> Partner:
    """The partner, if it is one: seen from its config.json, before any framework is loaded."""
    folder, remedy = partner.folder, "name the folder of a language model, for example models/ppo"
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder", remedy=remedy)
    try:
        architectures = json.loads((folder / "config.json").read_text(encoding="utf-8"))["architectures"]
    except (OSError, ValueError, KeyError):
        raise UserError(f"{folder}: no Hugging Face model (its config.json is missing or names no architecture)", remedy=remedy) from None
    # transformers would open a reward model as well, with a random head for words
    if not any("CausalLM" in name or "LMHead" in name for name in architectures):
        raise UserError(f"{folder}: a {', '.join(architectures)} does not write text", remedy=remedy)
    return partner


def questions() -> Iterator[str]:
    """What a person types, or the lines that are piped in."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    import readline  # noqa: F401 — gives input() its line editing and history

    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return


def converse(
    partner: Partner, lines: Iterable[str], write: Callable[[str], Any], temperature: float, max_tokens: int, stop_texts: Sequence[str] = ()
) -> None:
    """Answer each line, remembering the dialogue, until /quit or the end; /reset forgets it, /help lists the commands.

    Args:
        temperature, max_tokens, stop_texts: of rlhf.cli.speaker.Speaker.

    Raises:
        UserError: the partner's folder holds no model with a chat template.
    """

    def opened() -> Speaker:
        with _hidden("sklearn", "scipy", "boto3", "h2"):  # transformers would load them, for a second or two, and not need them
            from rlhf.cli.speaker import Speaker
        return Speaker(partner.folder, temperature, max_tokens, stop_texts)

    dialogue: list[Message] = []
    with ThreadPoolExecutor(1) as behind:
        opening = behind.submit(opened)
        for line in map(str.strip, lines):
            if line == "/quit":
                break
            if line == "/help":
                write(HELP)
            elif line == "/reset":
                dialogue = []
                write("(new dialogue)\n")
            elif line.startswith("/") and " " not in line:
                write(f"({line} is no command; /help lists them)\n")
            elif line:
                dialogue = _go_on(opening.result(), [*dialogue, {"role": "user", "content": line}], write)


@contextmanager
def _hidden(*packages: str) -> Iterator[None]:
    """Have packages count as not installed inside the block, whether they are loaded or not."""
    modules: dict[str, Any] = sys.modules
    loaded = {package: modules[package] for package in packages if package in modules}
    modules.update(dict.fromkeys(packages))
    try:
        yield
    finally:
        for package in packages:
            del modules[package]
        modules.update(loaded)


def _go_on(speaker: Speaker, dialogue: list[Message], write: Callable[[str], Any]) -> list[Message]:
    """The dialogue with an answer to its last question, without the oldest exchanges where it is too long."""
    while dialogue and not speaker.fits(dialogue):
        dialogue = dialogue[2:]
    if not dialogue:
        write(f"(too long: the model takes {speaker.room} tokens)\n")
        return []
    return [*dialogue, {"role": "assistant", "content": speaker.answer(dialogue, write)}]
