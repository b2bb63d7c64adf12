"""A row of each public dataset that rates answers: its prompt, the better answer, the other one."""

from __future__ import annotations

from typing import Any

HH_PROMPT = [("user", "Hi!"), ("assistant", "Yes?"), ("user", "Why: me?")]

RANKED: dict[str, tuple[dict[str, Any], list[tuple[str, str]], str, str | None]] = {
    "nectar": (
        {
            "prompt": "\n\nHuman: Hi!\n\nAssistant: Yes?\n\nHuman: Why: me?\n\nAssistant: ",
            "answers": [
                {"answer": "Hm.", "model": "b", "rank": 2.0},
                {"answer": "So.", "model": "a", "rank": 1.0},
                {"answer": "No.", "model": "c", "rank": 3.0},
            ],
            "num_responses": 3,
        },
        HH_PROMPT,
        "So.",
        "No.",
    ),
    "ultrafeedback": (
        {
            "source": "evol_instruct",
            "instruction": "Name a planet.",
            "completions": [
                {"model": "a", "response": "A planet.", "fine-grained_score": 3.5, "overall_score": 10.0, "custom_system_prompt": "…"},
                {"model": "b", "response": "Pizza", "fine-grained_score": 1.25, "overall_score": 1.0},
                {"model": "c", "response": "Mars is one.", "fine-grained_score": 4.75, "overall_score": 8.0},
                {"model": "d", "response": "Mars", "fine-grained_score": 4.75, "overall_score": 8.0},
            ],
        },
        [("user", "Name a planet.")],
        "Mars is one.",
        "Pizza",
    ),
    "helpsteer2-preference": (
        {
            "prompt": "Hi!\n<extra_id_1>Assistant\nYes?\n<extra_id_1>User\nWhy?",
            "response_1": "No.",
            "response_2": "So.",
            "preference_strength": 2,
            "split": "train",
        },
        [("user", "Hi!"), ("assistant", "Yes?"), ("user", "Why?")],
        "So.",
        "No.",
    ),
    "helpsteer3": (
        {
            "domain": "general",
            "context": [{"role": "user", "content": "Why?"}],
            "response1": "So.",
            "response2": "No.",
            "overall_preference": -1,
        },
        [("user", "Why?")],
        "So.",
        "No.",
    ),
    "openai-preference": (
        {
            "input": {"messages": [{"role": "user", "content": "Why?"}], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [{"role": "assistant", "content": "So."}],
            "non_preferred_output": [{"role": "assistant", "content": "No."}],
        },
        [("user", "Why?")],
        "So.",
        "No.",
    ),
    "kto": ({"prompt": [{"role": "user", "content": "Why?"}], "completion": "So.", "label": True}, [("user", "Why?")], "So.", None),
}
