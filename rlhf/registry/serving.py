"""The registered model: MLflow stores this file beside the weights and runs it where the model is served.

It stands alone: nothing of this project is imported, only torch, transformers and mlflow. The artifact `config` is the config.json of an
ordinary Hugging Face folder. Questions are texts, or dialogues as lists of {role, content}; each gets one answer, greedily.

The version's folder holds files.json, the SHA-256 of every file in it. A model is loaded only if they are all as they were registered.
"""

import hashlib
import json
import logging
import re
from pathlib import Path
from typing import Any

import mlflow
from mlflow.pyfunc import PythonModel, PythonModelContext

# what `predict` takes is a union on purpose
logging.getLogger("mlflow.types.type_hints").setLevel(logging.ERROR)

Message = dict[str, str]

LIST = "files.json"
# MLflow writes down here which version the folder was fetched for
NOT_LISTED = (LIST, "registered_model_meta")
MARK = "\ufdd0"  # of no character


def hashes(folder: Path) -> dict[str, str]:
    """The SHA-256 of each file of a version, by its path in the folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in NOT_LISTED and "__pycache__" not in path.parts:
            with path.open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def differences(folder: Path, listed: str | None = None) -> list[str]:
    """What is not as it was registered, in words that name the file; nothing if all is.

    Args:
        folder: of the version.
        listed: SHA-256 of files.json itself, where it is known from elsewhere.
    """
    try:
        content = (folder / LIST).read_bytes()
        before = json.loads(content)
    except (OSError, ValueError):
        return [f"{folder / LIST} is missing or damaged"]
    if listed not in (None, hashlib.sha256(content).hexdigest()):
        return [f"{folder / LIST} is not the one that was registered"]
    after = hashes(folder)
    said = {path: "was changed" for path in before.keys() & after.keys() if before[path] != after[path]}
    said |= dict.fromkeys(before.keys() - after.keys(), "is missing") | dict.fromkeys(after.keys() - before.keys(), "was added")
    return [f"{folder / path} {what} after it was registered" for path, what in sorted(said.items())]


class Assistant(PythonModel):
    """Answers questions with the chat template, the end tokens and the answer length of the model's folder."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the model.

        Raises:
            ValueError: names the files that are not as they were registered.
        """
        # late: whoever only checks the files does not wait for the frameworks
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        folder = Path(context.artifacts["config"]).parent
        if wrong := differences(folder.parent):
            raise ValueError(f"this version is refused: {'; '.join(wrong)}")
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.controls = controls(self.tokenizer)
        self.model = AutoModelForCausalLM.from_pretrained(folder, use_safetensors=True).eval()
        if torch.cuda.is_available():
            self.model.to("cuda")
        generation = self.model.generation_config
        self.max_new_tokens = int((context.model_config or {}).get("max_new_tokens") or generation.max_new_tokens or 256)

    def predict(self, model_input: list[str | Message | list[Message]]) -> list[str]:  # type: ignore[override]  # the base class is untyped in its arguments
        """One answer for each question; a bare list of messages is one dialogue."""
        questions: list[Any] = list(model_input)
        if questions and isinstance(questions[0], dict):
            questions = [questions]
        return [self._answer([{"role": "user", "content": question}] if isinstance(question, str) else question) for question in questions]

    def _answer(self, messages: list[Message]) -> str:
        import torch

        prompt = torch.tensor([self.encode(messages)], device=self.model.device)
        with torch.inference_mode():
            tokens = self.model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=self.max_new_tokens
            )
        return str(self.tokenizer.decode(tokens[0, prompt.shape[1] :], skip_special_tokens=True)).strip()

    def encode(self, messages: list[Message]) -> list[int]:
        """Token ids of a dialogue. The words of control tokens in its contents are cut in two: as text they end no turn and begin none."""
        text = str(self.tokenizer.apply_chat_template(self._cut(messages), add_generation_prompt=True, tokenize=False))
        return [number for part in text.split(MARK) for number in self.tokenizer(part, add_special_tokens=False)["input_ids"]]

    def _cut(self, value: Any) -> Any:
        """The same value, with a mark in each word of a control token; roles stay as they are."""
        if isinstance(value, str):
            return self.controls.sub(lambda found: found[0][0] + MARK + found[0][1:], value)
        if isinstance(value, dict):
            return {name: inner if name == "role" else self._cut(inner) for name, inner in value.items()}
        return [self._cut(inner) for inner in value] if isinstance(value, list) else value


def controls(tokenizer: Any) -> re.Pattern[str]:
    """The words of control tokens: special ones, and of the others that were added those that the chat template puts around turns."""
    dialogue = [{"role": role, "content": "A"} for role in ("user", "assistant", "user")]
    written = str(tokenizer.apply_chat_template(dialogue, tokenize=False))
    added = tokenizer.added_tokens_decoder.values()
    words = [str(token) for token in added if token.special or (str(token) in written and not str(token).isalnum())]
    longest_first = sorted((word for word in words if len(word) > 1 and not word.isspace()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


mlflow.models.set_model(Assistant())
