"""The registered model: MLflow stores this file beside the weights and runs it where the model is served.

It stands alone: nothing of this project is imported, only torch, transformers and mlflow. The artifact `config` is the config.json of an
ordinary Hugging Face folder. Questions are texts, or dialogues as lists of {role, content}; each gets one answer, greedily. A request in
the form of OpenAI's chat completions, or of their responses, gets a reply in that form: so `mlflow models serve` is asked at /invocations.

The version's folder holds files.json, the SHA-256 of every file in it. A model is loaded only if they are all as they were registered.
"""

import hashlib
import json
import logging
import re
import time
import uuid
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import mlflow
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE
from mlflow.pyfunc import PythonModel, PythonModelContext

# what `predict` takes is a union on purpose
logging.getLogger("mlflow.types.type_hints").setLevel(logging.ERROR)

Message = dict[str, str]
LIMITS = ("max_completion_tokens", "max_tokens", "max_output_tokens")
CHAT = {"messages", "model", "max_completion_tokens", "max_tokens", "temperature", "top_p", "n", "user"}
RESPONSES = {"input", "model", "max_output_tokens", "temperature", "top_p", "user"}

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


class Answering(ABC):
    """What is asked and given. Beside PythonModel: of a class below it MLflow would refuse all that is not the list of the type hint."""

    def predict(self, model_input: list[str | Message | list[Message]]) -> Any:
        """One answer for each question, a bare list of messages being one dialogue; of a request as a dict the reply in its form.

        Raises:
            MlflowException: the request is none that can be answered.
        """
        if isinstance(model_input, dict):
            return self._reply(model_input)
        if isinstance(model_input, str):
            model_input = [model_input]
        if (columns := getattr(model_input, "columns", None)) is not None:  # a table, from `mlflow.evaluate`
            if len(columns) != 1:
                raise _refused("a table has one column, of questions; a request with further fields is a dict")
            model_input = model_input[columns[0]].tolist()
        questions: list[Any] = list(model_input)
        if questions and isinstance(questions[0], dict):
            questions = [questions]
        return [self._answer(self._dialogue(question), {})[0].strip() for question in questions]

    def _reply(self, body: dict[str, Any]) -> dict[str, Any]:
        chat = "messages" in body
        known = CHAT if chat else RESPONSES
        if unknown := sorted(name for name, value in body.items() if name not in known and value not in (None, False)):
            raise _refused(f"{', '.join(unknown)}: not known here; these fields are: {', '.join(sorted(known))}")
        if body.get("n") not in (None, 1):
            raise _refused("n: one answer is given")
        messages = self._dialogue(body.get("messages" if chat else "input"))
        text, prompt, answer, finish = self._answer(messages, body)
        number, created = uuid.uuid4().hex, int(time.time())
        if not chat:
            part = {"type": "output_text", "text": text, "annotations": []}
            item = {"type": "message", "id": f"msg_{number}", "role": "assistant", "status": "completed", "content": [part]}
            used: dict[str, Any] = {"input_tokens": prompt, "output_tokens": answer, "total_tokens": prompt + answer}
            used |= {"input_tokens_details": {"cached_tokens": 0}, "output_tokens_details": {"reasoning_tokens": 0}}
            return {
                "id": f"resp_{number}",
                "object": "response",
                "created_at": created,
                "status": "completed",
                "output": [item],
                "usage": used,
            }
        choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
        used = {"prompt_tokens": prompt, "completion_tokens": answer, "total_tokens": prompt + answer}
        head = {"id": f"chatcmpl-{number}", "object": "chat.completion", "created": created, "model": str(body.get("model") or "assistant")}
        return head | {"choices": [choice], "usage": used}

    def _dialogue(self, given: Any) -> list[Message]:
        if isinstance(given, str):
            return [{"role": "user", "content": given}]
        messages = [_message(message) for message in given] if isinstance(given, list) else []
        if not messages:
            raise _refused("a dialogue is a text, or a list of {role, content}")
        return messages

    @abstractmethod
    def _answer(self, messages: list[Message], wanted: dict[str, Any]) -> tuple[str, int, int, str]:
        """The answer, tokens of prompt and answer, and how it ended."""


class Assistant(Answering, PythonModel):  # type: ignore[misc]  # the base class is untyped in its arguments
    """Answers questions with the chat template, the end tokens and the answer length of the model's folder."""

    def load_context(self, context: PythonModelContext) -> None:
        """Open the model.

        Raises:
            ValueError: names the files that are not as they were registered.
        """
        # late: whoever only checks the files does not wait for the frameworks
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils.logging import disable_progress_bar

        disable_progress_bar()  # a server's log is no terminal
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

    def _answer(self, messages: list[Message], wanted: dict[str, Any]) -> tuple[str, int, int, str]:
        """The answer, tokens of prompt and answer, and how it ended."""
        import torch

        prompt = torch.tensor([self.encode(messages)], device=self.model.device)
        settings = _settings(wanted, self.max_new_tokens)
        room = (getattr(self.model.config, "max_position_embeddings", None) or 2**31) - prompt.shape[1]
        if room < 1:
            raise _refused(f"the dialogue has {prompt.shape[1]} tokens, and the model takes {room + prompt.shape[1]} with the answer")
        settings["max_new_tokens"] = min(settings["max_new_tokens"], room)
        with torch.inference_mode():
            tokens = self.model.generate(input_ids=prompt, attention_mask=torch.ones_like(prompt), **settings)[0, prompt.shape[1] :]
        ended = tokens[-1:].tolist()[0] in _ends(self.model.generation_config, self.tokenizer)
        text = str(self.tokenizer.decode(tokens, skip_special_tokens=True))
        return text, prompt.shape[1], len(tokens), "stop" if ended else "length"

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


def _ends(generation: Any, tokenizer: Any) -> list[int]:
    found = generation.eos_token_id if generation.eos_token_id is not None else tokenizer.eos_token_id
    return found if isinstance(found, list) else [found]


def _message(given: Any) -> Message:
    """As the chat template takes it; a content in parts is put together."""
    if not isinstance(given, dict) or not isinstance(given.get("role"), str):
        raise _refused("a message is {role, content}")
    content = given.get("content") or ""
    if isinstance(content, list):
        texts = [part.get("text") if isinstance(part, dict) else None for part in content]
        content = "".join(texts) if all(isinstance(text, str) for text in texts) else None  # type: ignore[arg-type]  # all are texts, as was just asked
    if not isinstance(content, str):
        raise _refused("content: a text, or a list of {type, text}")
    return given | {"role": "system" if given["role"] == "developer" else given["role"], "content": content}


def _settings(wanted: dict[str, Any], usual: int) -> dict[str, Any]:
    """What `generate` is called with: greedy unless a temperature is given."""
    limits = [wanted[name] for name in LIMITS if wanted.get(name) is not None]
    temperature, top_p = wanted.get("temperature") or 0, wanted.get("top_p") or 1
    if any(type(limit) is not int or limit < 1 for limit in limits):
        raise _refused(f"{' or '.join(LIMITS)}: a whole number from 1 on")
    if any(type(value) not in (int, float) for value in (temperature, top_p)) or not (0 <= temperature <= 2 and 0 < top_p <= 1):
        raise _refused("temperature: 0 … 2, and top_p: above 0, 1 at most")
    settings = {"max_new_tokens": limits[0] if limits else usual, "do_sample": temperature > 0}
    return settings | ({"temperature": float(temperature), "top_p": float(top_p), "top_k": 0} if temperature else {})


def _refused(what: str) -> MlflowException:
    return MlflowException(what, error_code=INVALID_PARAMETER_VALUE)


def controls(tokenizer: Any) -> re.Pattern[str]:
    """The words of control tokens: special ones, and of the others that were added those that the chat template puts around turns."""
    dialogue = [{"role": role, "content": "A"} for role in ("user", "assistant", "user")]
    written = str(tokenizer.apply_chat_template(dialogue, tokenize=False))
    added = tokenizer.added_tokens_decoder.values()
    words = [str(token) for token in added if token.special or (str(token) in written and not str(token).isalnum())]
    longest_first = sorted((word for word in words if len(word) > 1 and not word.isspace()), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")


mlflow.models.set_model(Assistant())
