"""What several test files share: telemetry off, homes of its own for each worker, a tiny tokenizer and a tiny Llama."""

from __future__ import annotations

import os
import tempfile
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

os.environ.setdefault("DO_NOT_TRACK", "true")
os.environ.setdefault("DVC_NO_ANALYTICS", "true")
os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # on tiny models a second thread only waits for the first
# before Prefect and DVC are imported; workers, and the user's own servers, share nothing
HOMES = tempfile.TemporaryDirectory(prefix="rlhf-tests-")
os.environ |= {"PREFECT_HOME": f"{HOMES.name}/prefect", "DVC_SITE_CACHE_DIR": f"{HOMES.name}/dvc"}

# files that take longest come first: with several workers (`make test`, one file at a time on each) none of them is left to the end
LONGEST = ("test_end_to_end", "test_engine", "test_families", "test_flow", "test_team", "test_launch")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: number for number, name in enumerate(LONGEST)}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


def pytest_xdist_auto_num_workers() -> int:
    """Half of the suite's time is waiting: for servers, processes, disks."""
    return (os.cpu_count() or 1) + 1


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """The project's byte-level BPE with the role-token template, trained on a few sandbox passages."""
    from rlhf.data.sandbox import make_rows
    from rlhf.models.tokenizer import build_tokenizer

    return build_tokenizer((row["text"] for row in make_rows("text", 50, 1, 0.0)), 400, 128)


@pytest.fixture
def llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    return tiny_llama(tokenizer)


def tiny_llama(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A random Llama with grouped-query attention for that tokenizer; its weights are large enough for uneven distributions."""
    import torch

    from rlhf.config.training import BuiltBase
    from rlhf.models.policy import build_policy

    params = BuiltBase.model_construct(hidden_size=32, intermediate_size=48, layers=2, heads=4, kv_heads=2, context_tokens=128)
    model = build_policy(params, tokenizer, 1).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(8)
    return model
