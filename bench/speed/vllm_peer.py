"""vLLM's CPU build as a peer of generation.py. It is run by the interpreter of an environment of its own, which lacks this project.

PYTHON bench/speed/vllm_peer.py FOLDER PRECISION THREADS WORK.json

WORK.json: token ids of the prompts, and how long each answer gets. For each line on standard input it samples once, and prints what
that took: seconds, and seconds of processor time.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

MEMORY = 1  # GiB for keys and values
LONGEST = 512  # tokens, prompt and answer


def main(folder: str, precision: str, threads: str, work: str) -> None:
    """Load, then sample whenever it is told to."""
    os.environ |= {
        "VLLM_NO_USAGE_STATS": "1",
        "DO_NOT_TRACK": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(MEMORY),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": threads,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # all in this process, so that its processor time counts
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what it prints itself
    from vllm import LLM, SamplingParams, TokensPrompt

    plan = json.loads(Path(work).read_text(encoding="utf-8"))
    engine = LLM(
        model=folder,
        dtype={"fp32": "float32", "bf16": "bfloat16"}[precision],
        max_model_len=LONGEST,
        max_num_seqs=len(plan["prompts"]),
        max_num_batched_tokens=sum(map(len, plan["prompts"])),
        enforce_eager=True,
        enable_prefix_caching=False,
        skip_tokenizer_init=True,
        generation_config="vllm",
    )
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in plan["prompts"]]
    wanted = [
        SamplingParams(temperature=1.0, max_tokens=length, ignore_eos=True, logprobs=0, detokenize=False) for length in plan["lengths"]
    ]
    print("ready", file=answers)
    for _ in sys.stdin:
        started, processor = time.perf_counter(), time.process_time()
        found = engine.generate(prompts, wanted, use_tqdm=False)
        print(json.dumps({"seconds": time.perf_counter() - started, "processor": time.process_time() - processor}), file=answers)
        if [len(one.outputs[0].token_ids) for one in found] != plan["lengths"]:
            sys.exit("answers of other lengths than planned")


if __name__ == "__main__":
    main(*sys.argv[1:])
