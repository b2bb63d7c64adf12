"""What only a GPU does: its attention kernels, the captured decoding step, the stages through NCCL. Without one all of it is skipped."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from stage_runs import TRAINED, make_workspace, set_params, table, tiny_params
from test_families import EOS, FAMILIES, PAD, padded_left, sequences, tiny
from torch import Tensor
from transformers import PreTrainedModel

from rlhf import command, config
from rlhf.data.batches import pack
from rlhf.models.attention import attend
from rlhf.models.pieces import Ragged
from rlhf.models.policy import logits_at
from rlhf.rollout import decoding
from rlhf.rollout.generate import Rollouts, Stop, generate
from rlhf.rollout.sampling import Sampling

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")

GPU = torch.device("cuda")
PROMPTS = 40
DRAWN = Sampling(1.0, 0, 1.0, 16)


@pytest.fixture(autouse=True)
def _as_stages_compute() -> Any:
    """With the same bits every time, where torch knows how."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
        yield
        torch.use_deterministic_algorithms(False)


def on_gpu(family: str, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return cast(PreTrainedModel, cast(Any, tiny(family)).to(GPU, dtype))


def answers_of(model: PreTrainedModel, sampling: Sampling, eos_id: int = EOS, stop: Stop | None = None) -> Rollouts:
    prompts = sequences(range(1, PROMPTS + 1))
    return generate(model, prompts, range(PROMPTS), sampling, eos_id=eos_id, pad_id=PAD, slots=24, stop=stop)


def early(number: int, answer: list[int]) -> bool:
    """Answers of one to 16 tokens: at the end few slots are in use."""
    return len(answer) == number % 16 + 1


# ----------------------------------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("shared", [False, True])
def test_attention_of_all_pieces_at_once_is_that_of_each(dtype: torch.dtype, tolerance: float, shared: bool) -> None:
    begin = list(range(100, 140)) if shared else []
    packed = pack([begin + row for row in sequences((30, 3, 1, 70))], "cpu")
    torch.manual_seed(1)
    states = [torch.randn(1, heads, packed.ids.shape[1], 16, dtype=torch.float64) for heads in (8, 2, 2)]
    slopes = torch.randn(1, packed.ids.shape[1], 8, 16, dtype=torch.float64)
    found = []
    for pieces, device, kind in ((packed.pieces, "cpu", torch.float64), (Ragged.of(packed.pieces, GPU), "cuda", dtype)):
        given = [state.to(device, kind).requires_grad_() for state in states]
        made = attend(torch.nn.Module(), given[0], given[1], given[2], None, pieces)[0]
        gradients = torch.autograd.grad((made * slopes.to(device, kind)).sum(), given)
        found.append([tensor.double().cpu() for tensor in (made, *gradients)])
    torch.testing.assert_close(found[1], found[0], rtol=tolerance, atol=2 * tolerance)


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_logits_and_gradients_are_those_of_the_cpu(family: str) -> None:
    prompt, *answers = sequences((20, 9, 4, 13, 6))
    found = []
    for device in ("cpu", "cuda"):
        model = cast(Any, tiny(family)).to(device)
        packed = pack([prompt + answer for answer in answers], device)
        wanted = packed.predictions([[0] * len(prompt) + [1] * len(answer) for answer in answers])
        logits = logits_at(model, packed, wanted.places)
        gradients = torch.autograd.grad(logits.sin().sum(), list(model.parameters()))
        found.append([tensor.cpu() for tensor in (logits.detach(), *gradients)])
    scale = max(tensor.abs().max().item() for tensor in found[0])
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=1e-5 * scale)


# ---------------------------------------------------------------------------------------------------------------- generation


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_answers_are_those_of_transformers(family: str) -> None:
    model, prompts = on_gpu(family), sequences(range(1, PROMPTS + 1))
    left = {name: values.to(GPU) for name, values in padded_left(prompts, PAD).items()}
    options = {"attention_mask": left["attention_mask"], "do_sample": False, "max_new_tokens": 16, "pad_token_id": PAD}
    made = cast(Any, model).generate(left["input_ids"], eos_token_id=None, **options)[:, left["input_ids"].shape[1] :].tolist()
    eos_id = made[0][4]
    found = answers_of(model, Sampling(0.0, 0, 1.0, 16), eos_id)
    assert found.answers == [row[: row.index(eos_id) + 1] if eos_id in row else row for row in made]


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 0.1)])
@pytest.mark.parametrize("family", FAMILIES)
def test_log_probs_of_sampled_tokens_are_those_of_a_full_forward_pass(family: str, dtype: torch.dtype, tolerance: float) -> None:
    model = on_gpu(family, dtype)
    if dtype != torch.float32:  # so that the numbers are of the size that a bf16 model's are
        for parameter in model.parameters():
            parameter.div_(2 if parameter.ndim == 2 else 1)
    found = answers_of(model, Sampling(0.9, 50, 0.95, 16))
    reference = cast(Any, tiny(family))
    for own, theirs in zip(reference.parameters(), model.parameters(), strict=True):
        own.copy_(theirs)
    for prompt, answer, log_probs in zip(found.prompts, found.answers, found.log_probs, strict=True):
        logits = reference(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        expected = (logits / 0.9).log_softmax(-1)[torch.arange(len(answer)), answer]
        torch.testing.assert_close(torch.tensor(log_probs), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_captured_step_gives_what_the_same_operations_give_one_by_one(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    model = on_gpu("llama", dtype)
    captured: list[int] = []
    run = decoding.GraphDecoder._run_and_capture

    def note(self: decoding.GraphDecoder, rows: int) -> None:
        run(self, rows)
        captured.extend([rows] if self.captures else [])

    monkeypatch.setattr(decoding.GraphDecoder, "_run_and_capture", note)
    first = answers_of(model, DRAWN, stop=early)
    assert sorted(captured) == [2, 6, 24] or sorted(captured) == [1, 2, 6, 24]
    assert answers_of(model, DRAWN, stop=early) == first
    monkeypatch.setattr(decoding.GraphDecoder, "_run", decoding.GraphDecoder._compute)
    assert answers_of(model, DRAWN, stop=early) == first


def test_the_next_rollout_uses_the_new_weights() -> None:
    model = on_gpu("opt")
    before = answers_of(model, DRAWN)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    assert answers_of(model, DRAWN).answers != before.answers


@pytest.mark.parametrize("wait", [lambda ids: ids.max().item(), lambda _: torch.cuda.synchronize()])
def test_a_model_that_cannot_be_captured_is_run_as_it_stands(wait: Callable[[Tensor], object], caplog: pytest.LogCaptureFixture) -> None:
    model = on_gpu("llama")
    expected = answers_of(model, DRAWN)

    def hold_up(_: Any, __: Any, given: dict[str, Any]) -> None:
        wait(given["input_ids"])

    hook = model.register_forward_pre_hook(hold_up, with_kwargs=True)
    found = answers_of(model, DRAWN)
    hook.remove()
    assert found.answers == expected.answers
    assert "llama decodes without a captured graph" in caplog.text
    assert answers_of(model, DRAWN) == expected
    assert torch.cuda.get_sync_debug_mode() == 0
    assert torch.rand(1, device=GPU).item() < 1
    assert torch.cuda.current_stream() == torch.cuda.default_stream()


# ---------------------------------------------------------------------------------------------------------------- the stages


def launch(root: Path, *stages: str) -> None:
    """Run stages on the GPU as the launcher does."""
    for stage in stages:
        folder = root / "runs" / stage
        folder.mkdir(parents=True)
        params = config.load(root / "params.yaml")
        words = command.command(stage, f"rlhf.stages.{stage}", params, [0])
        environment = command.environment(stage, params, root, folder, "cuda")
        done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        shutil.copytree(folder / "out", root, dirs_exist_ok=True)


def half_precision(**engines: Any) -> dict[str, Any]:
    raw = tiny_params()
    raw["launch"] |= {"precision": "bf16"}
    for name in ("policy", "critic"):
        raw["launch"]["engines"][name] |= engines
    raw["base"] |= {"heads": 4, "kv_heads": 2}
    return raw


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("gpu")
    make_workspace(root, half_precision(), pairs=240)
    launch(root, *TRAINED)
    return root


def again(trained: Path, place: Path, raw: dict[str, Any], *stages: str) -> Path:
    """Run stages once more, from the same inputs."""
    shutil.copytree(trained, place, ignore=shutil.ignore_patterns("runs", *(stage for stage in stages)))
    set_params(place, raw)
    launch(place, *stages)
    return place


def weights(root: Path, stage: str) -> bytes:
    return (root / "models" / stage / "model.safetensors").read_bytes()


def test_the_stages_train_in_half_precision_and_give_the_same_bytes_again(trained: Path, tmp_path: Path) -> None:
    steps = table(trained / "plots/ppo.csv")
    assert all(float(step["ratio_error"]) < 1e-3 for step in steps)
    assert float(steps[-1]["actor_grad_norm"]) > 0
    root = again(trained, tmp_path / "again", half_precision(), "sft", "reward", "ppo")
    assert [weights(root, stage) == weights(trained, stage) for stage in ("sft", "reward", "ppo")] == [True] * 3


@pytest.mark.parametrize("gather", ["whole", "layers"])
def test_models_shared_out_and_offloaded_train(trained: Path, tmp_path: Path, gather: str) -> None:
    raw = half_precision(zero_stage=3, offload_optimizer=True, offload_parameters=True)
    raw["launch"]["rollout"]["gather"] = gather
    root = again(trained, tmp_path / "shared", raw, "ppo")
    for found, expected in zip(table(root / "plots/ppo.csv"), table(trained / "plots/ppo.csv"), strict=True):
        assert float(found["score"]) == pytest.approx(float(expected["score"]), abs=0.2)
        assert float(found["value_loss"]) == pytest.approx(float(expected["value_loss"]), rel=0.2)


def test_the_rollout_says_what_training_finds_in_fp32(trained: Path, tmp_path: Path) -> None:
    raw = half_precision()
    raw["launch"]["precision"] = "fp32"
    steps: Sequence[dict[str, str]] = table(again(trained, tmp_path / "fp32", raw, "ppo", "dpo") / "plots/ppo.csv")
    assert max(float(step["ratio_error"]) for step in steps) < 1e-4
