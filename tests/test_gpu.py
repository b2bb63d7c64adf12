"""What only a GPU does: its attention kernels, the captured decoding step, the stages through NCCL. Without one all of it is skipped."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf import config
from rlhf.kernels import kernels
from rlhf.launcher import command
from rlhf.models.attention import attend
from rlhf.models.packed import pack
from rlhf.models.pieces import Ragged
from rlhf.models.policy import logits_at
from rlhf.rollout import decoding
from rlhf.rollout.generate import Rollouts, Stop, generate
from rlhf.rollout.gpu import Attention, attend_at_once, attend_by_torch
from rlhf.rollout.sampling import Sampling
from tests.models.families import EOS, FAMILIES, PAD, padded_left, sequences, tiny
from tests.stage_runs import REPOSITORY, TRAINED, free_port, make_workspace, set_params, table, tiny_params

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
    # scores are as large as their rounding allows
    return cast(PreTrainedModel, cast(Any, tiny(family, scores=8 if dtype == torch.float32 else 1)).to(GPU, dtype))


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
        made = attend(torch.nn.Module(), given[0], given[1], given[2], torch.empty(1, 1, 0, 0), pieces)[0]
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
    torch.testing.assert_close(found[1], found[0], rtol=1e-4, atol=2e-5 * scale)


@pytest.fixture(params=["made for it", "torch's"])
def kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Attention:
    """Which attention a decoding step takes."""
    if request.param == "torch's":
        monkeypatch.setattr("rlhf.rollout.cache.attend_at_once", lambda: attend_by_torch)
        return attend_by_torch
    assert attend_at_once() is not attend_by_torch
    return attend_at_once()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)])
@pytest.mark.parametrize(("heads", "sharing", "width", "capacity"), [(4, 4, 8, 90), (8, 2, 64, 200), (6, 2, 24, 70), (4, 4, 256, 150)])
def test_attention_of_one_token_to_its_slot(
    kernel: Attention, heads: int, sharing: int, width: int, capacity: int, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(1)
    lengths = [capacity - 1, 0, capacity // 2, 64]

    def random(rows: int, tokens: int, count: int) -> Tensor:
        return torch.randn(rows, tokens, count, width, dtype=torch.float64).to(dtype).transpose(1, 2)

    given = [random(4, 1, count) for count in (heads, sharing, sharing)]
    held = [random(5, capacity, sharing) for _ in range(2)]
    there = [states.to(GPU) for states in held]
    query, new_key, new_value = (states.to(GPU) for states in given)
    found = kernel(query, new_key, new_value, there[0], there[1], torch.tensor(lengths, device=GPU), 0.3)
    query, *new = (states.double() for states in given)
    for row, length in enumerate(lengths):
        for states, one in zip(held, new, strict=True):
            states[row, :, length] = one[row, :, 0].to(dtype)
        keys, values = (states[row, :, : length + 1].double().repeat_interleave(heads // sharing, 0) for states in held)
        expected = (0.3 * query[row] @ keys.mT).softmax(-1) @ values
        torch.testing.assert_close(found[row].double().cpu(), expected, rtol=tolerance, atol=tolerance)
    assert all(torch.equal(states.cpu(), expected) for states, expected in zip(there, held, strict=True))


def noted(forward: Callable[..., Any], name: str, asked: list[str]) -> Any:
    def note(*given: Any) -> Any:
        asked.append(name)
        return forward(*given)

    return staticmethod(note)


def test_a_loaded_models_layers_take_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    model, asked = on_gpu("llama", torch.bfloat16), list[str]()
    for name in ("Norm", "Rotation", "Gate"):
        kind = getattr(kernels("layers"), name)
        monkeypatch.setattr(kind, "forward", noted(kind.forward, name, asked))
    model(input_ids=torch.ones(1, 5, dtype=torch.long, device=GPU))
    assert {name: asked.count(name) for name in asked} == {"Norm": 5, "Rotation": 2, "Gate": 2}


# ---------------------------------------------------------------------------------------------------------------- generation


@torch.no_grad()
@pytest.mark.usefixtures("kernel")
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
@pytest.mark.usefixtures("kernel")
@pytest.mark.parametrize(
    ("family", "dtype", "tolerance"),
    [
        *((family, torch.float32, 1e-4) for family in FAMILIES),
        # where there are experts, rounding sends some tokens to others
        *((family, torch.bfloat16, 0.1) for family, sizes in FAMILIES.items() if "num_experts" not in sizes),
    ],
)
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


@pytest.mark.usefixtures("kernel")
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
    assert captured == [24]  # a smaller one does not pay for a few steps
    monkeypatch.setattr(decoding, "PATIENCE", 0)
    second = answers_of(model, DRAWN, stop=early)
    assert second.answers == first.answers
    assert captured[:3] == [24, 24, 6]  # and one for the last answers, where they are written alone for long enough
    assert answers_of(model, DRAWN, stop=early) == second
    monkeypatch.setattr(decoding.GraphDecoder, "_run", decoding.GraphDecoder._compute)
    assert answers_of(model, DRAWN, stop=early) == second


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


def half_precision(**engines: Any) -> dict[str, Any]:
    raw = tiny_params()
    raw["launch"]["precision"] = "bf16"
    for name in ("policy", "critic"):
        raw["launch"]["engines"][name] |= engines
    raw["base"] |= {"heads": 4, "kv_heads": 2}
    return raw


def run_on_gpu(root: Path, *words: str) -> None:
    """Run stages one after the other in one process, a rank of its own (tests/stage_runs.py)."""
    place = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    path = os.pathsep.join([str(REPOSITORY), os.environ.get("PYTHONPATH", "")])
    settings = {"DS_ACCELERATOR": "cuda", "CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": path}
    command = [sys.executable, "-c", "import sys; from tests import stage_runs; stage_runs.main(sys.argv[1:])", *words]
    done = subprocess.run(command, cwd=root, env=os.environ | place | settings, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of stages on a GPU, all from the same data: `first`, and others in which some stages ran once more."""
    root = tmp_path_factory.mktemp("gpu")
    make_workspace(root / "first", half_precision(), pairs=240)
    run_on_gpu(root, *(f"first/{stage}" for stage in (*TRAINED, "dpo", "evaluate")))
    shared = {"zero_stage": 3, "offload_optimizer": True, "offload_parameters": True}
    again = {"again": half_precision(), "whole": half_precision(**shared), "layers": half_precision(**shared), "fp32": half_precision()}
    again["layers"]["launch"]["rollout"]["gather"] = "layers"
    again["fp32"]["launch"]["precision"] = "fp32"
    for name, raw in again.items():
        shutil.copytree(root / "first", root / name, ignore=shutil.ignore_patterns("runs"))
        set_params(root / name, raw)
    run_on_gpu(root, "again/sft", "again/reward", *(f"{name}/ppo" for name in again))
    return root


def course(root: Path, column: str) -> list[float]:
    return [float(row[column]) for row in table(root / "plots/ppo.csv")]


def test_the_stages_train_in_half_precision_and_give_the_same_bytes_again(trained: Path) -> None:
    for stage in ("sft", "reward", "ppo"):
        first, again = (trained / name / "models" / stage / "model.safetensors" for name in ("first", "again"))
        assert first.read_bytes() == again.read_bytes(), stage
    assert min(course(trained / "first", "critic_grad_norm")) > 0
    assert course(trained / "first", "actor_grad_norm")[-1] > 0
    assert max(course(trained / "first", "ratio_error")) < 1e-3  # training and scoring compute alike
    assert (trained / "first/metrics/evaluate.json").exists()


@pytest.mark.parametrize("gather", ["whole", "layers"])
def test_models_shared_out_and_offloaded_train_alike(trained: Path, gather: str) -> None:
    assert course(trained / gather, "score") == pytest.approx(course(trained / "first", "score"), abs=0.2)
    assert course(trained / gather, "value_loss") == pytest.approx(course(trained / "first", "value_loss"), rel=0.2)


def test_training_finds_the_log_probs_of_the_rollout_in_fp32(trained: Path) -> None:
    assert max(course(trained / "fp32", "ratio_error")) < 1e-4


def test_the_launcher_starts_a_stage_on_a_gpu(trained: Path, tmp_path: Path) -> None:
    root = tmp_path / "launched"
    shutil.copytree(trained / "first", root, ignore=shutil.ignore_patterns("runs", "sft"))
    params, folder = config.load(root / "params.yaml"), root / "runs/sft"
    folder.mkdir(parents=True)
    words = command.command("sft", "rlhf.stages.sft", params, [0])
    environment = command.environment("sft", params, root, folder, "cuda")
    done = subprocess.run(words, cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    weights = "models/sft/model.safetensors"
    assert (folder / "out" / weights).read_bytes() == (trained / "first" / weights).read_bytes()
