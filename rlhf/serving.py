"""The registered model: MLflow stores this file beside the weights and runs it where the model is served.

MLflow stores this package beside it, so that answers come from the code that training sampled with; of it, only what needs no more than
torch, transformers and mlflow is imported. The artifact `config` is the config.json of an ordinary Hugging Face folder. Questions are
texts, or dialogues as lists of {role, content}; each gets one answer, greedily.
"""

from pathlib import Path
from typing import Any

import mlflow
import torch
from mlflow.pyfunc import PythonModel, PythonModelContext
from transformers import AutoModelForCausalLM, AutoTokenizer

from rlhf.data.batches import decode_answer, encode_dialogues
from rlhf.rollout.generate import generate
from rlhf.rollout.sampling import Sampling

SLOTS = 64  # answers written at a time
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

    def predict(self, model_input: list[str | Message | list[Message]]) -> list[str]:  # type: ignore[override]
        """One answer for each question, whatever else is asked; a bare list of messages is one dialogue."""
        questions: list[Any] = list(model_input)
        if questions and isinstance(questions[0], dict):
            questions = [questions]
        dialogues = [[{"role": "user", "content": question}] if isinstance(question, str) else question for question in questions]
        prompts = [ids for ids, _ in encode_dialogues(self.tokenizer, dialogues)]
        greedy = Sampling(temperature=0.0, top_k=0, top_p=1.0, max_new_tokens=self.max_new_tokens)
        ends = {"eos_id": self.tokenizer.eos_token_id, "pad_id": self.tokenizer.pad_token_id}
        answers = generate(self.model, prompts, [0] * len(prompts), greedy, **ends, slots=SLOTS).answers
        return [decode_answer(self.tokenizer, answer) for answer in answers]


mlflow.models.set_model(Assistant())
