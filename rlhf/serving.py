"""The registered model: MLflow stores this file beside the weights and runs it where the model is served.

It stands alone: nothing of this project is imported, only torch, transformers and mlflow. The artifact `config` is the config.json of an
ordinary Hugging Face folder. Questions are texts, or dialogues as lists of {role, content}; each gets one answer, greedily.
"""

from pathlib import Path
from typing import Any

import mlflow
import torch
from mlflow.pyfunc import PythonModel, PythonModelContext
from transformers import AutoModelForCausalLM, AutoTokenizer

Message = dict[str, str]


class Assistant(PythonModel):
    """Answers questions with the chat template, the end tokens and the answer length of the model's folder."""

    def load_context(self, context: PythonModelContext) -> None:
        folder = Path(context.artifacts["config"]).parent
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
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
        prompt: Any = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        prompt = prompt.to(self.model.device)
        with torch.inference_mode():
            tokens = self.model.generate(**prompt, do_sample=False, max_new_tokens=self.max_new_tokens)
        return str(self.tokenizer.decode(tokens[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)).strip()


mlflow.models.set_model(Assistant())
