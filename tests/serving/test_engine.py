"""The engine: answers that do not hang on their neighbours, and how each of them comes and ends."""

from __future__ import annotations

import random
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf.rollout.generate import generate
from rlhf.rollout.sampling import Sampling, sample
from rlhf.serving.draw import draw
from rlhf.serving.engine import Engine, Users
from rlhf.serving.requests import Answers, End, Event, Piece, Request, Token, events
from rlhf.serving.texts import LONGEST, Text
from rlhf.serving.writer import Writer

LIMIT = 40
ASKED = Request((11, 12, 13), max_tokens=LIMIT, seed=7, seconds=60)


def answers(engine: Answers, request: Request) -> dict[int, tuple[str, End, list[Token]]]:
    """The whole of each choice."""
    told = list(events(engine, request))
    ends = {event.choice: event for event in told if isinstance(event, End)}

    def of(choice: int) -> list[Piece]:
        return [event for event in told if isinstance(event, Piece) and event.choice == choice]

    return {
        choice: ("".join(piece.text for piece in of(choice)), end, [token for piece in of(choice) for token in piece.tokens])
        for choice, end in ends.items()
    }


def some_requests() -> list[Request]:
    drawn = random.Random(1)
    return [
        Request(
            prompt=tuple(drawn.randrange(5, 400) for _ in range(drawn.randrange(1, 80))),
            max_tokens=drawn.randrange(1, LIMIT),
            seed=drawn.randrange(1000),
            seconds=60,
            temperature=drawn.choice([0.0, 0.7, 1.0]),
            top_p=drawn.choice([0.8, 1.0]),
            choices=drawn.choice([1, 1, 3]),
            top=2,
        )
        for _ in range(40)
    ]


def test_an_answer_is_the_same_alone_and_among_others_to_the_last_bit(engine: Engine) -> None:
    requests = some_requests()
    alone = [answers(engine, request) for request in requests]
    with ThreadPoolExecutor(len(requests)) as at_once:
        assert list(at_once.map(lambda request: answers(engine, request), requests)) == alone  # log-probabilities, too
    assert len({text for found in alone for text, _, _ in found.values()}) > 30


def test_prompts_that_are_read_at_once_begin_as_each_by_itself(folder: Path) -> None:
    writer, chance = Writer(folder, 16, 128), random.Random(1)
    alike = [chance.randrange(5, 200) for _ in range(40)]
    prompts = [[*alike[: chance.choice((0, 40))], *(chance.randrange(5, 200) for _ in range(chance.randrange(1, 60)))] for _ in range(16)]
    with torch.no_grad():
        alone = [writer.read([prompt])[0] for prompt in prompts]
        for _ in range(10):
            some = chance.sample(range(16), chance.randrange(2, 17))
            for number, (layers, logits) in zip(some, writer.read([prompts[number] for number in some]), strict=True):
                assert torch.equal(logits, alone[number][1])
                assert all(torch.equal(*both) for pair in zip(layers, alone[number][0], strict=True) for both in zip(*pair, strict=True))
    writer.close()


def test_each_row_is_drawn_by_its_own_sampling() -> None:
    torch.manual_seed(1)
    logits, uniforms = 3 * torch.randn(6, 3000), torch.rand(6)
    temperatures, masses = [1.0, 0.7, 0.0, 1e-40, 1.0, 0.7], [0.9, 0.5, 0.9, 0.9, 1.0, 0.999]
    expected = [
        sample(logits[row, None], uniforms[row, None], Sampling(temperatures[row], 0, masses[row], 1))[0].item() for row in range(6)
    ]
    assert draw(logits, uniforms, temperatures, masses) == expected
    for wrong in (float("nan"), float("inf")):
        logits[1, 5] = wrong
        with pytest.raises(ArithmeticError, match="NaN or infinite"):
            draw(logits, uniforms, temperatures, masses)


def test_answers_of_about_the_same_length_attend_in_one_call_as_each_by_itself(folder: Path) -> None:
    writer, chance = Writer(folder, 64, 128), random.Random(1)
    prompts = [[chance.randrange(5, 200) for _ in range(chance.randrange(33, 47))] for _ in range(64)]

    def steps(some: range) -> torch.Tensor:
        for slot, number in enumerate(some):
            writer.place(slot, begun[number])
        return writer.step([7] * len(some), [len(prompts[number]) for number in some])

    with torch.no_grad():
        begun = [layers for layers, _ in writer.read(prompts)]
        alone = torch.cat([steps(range(number, number + 1)) for number in range(64)])
        assert torch.equal(steps(range(64)), alone)
        assert len(writer._cache.spans) == 1
        prompts[0], begun[0] = prompts[0] * 2, [(keys.repeat(1, 2, 1), values.repeat(1, 2, 1)) for keys, values in begun[0]]
        assert torch.equal(steps(range(64))[1:], alone[1:])
        assert len(writer._cache.spans) == 4  # the others are not to read so many columns
    writer.close()


def test_a_seed_draws_what_rollouts_draw(engine: Engine, llama: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    for temperature, top_p in ((0.0, 1.0), (1.0, 1.0), (0.8, 0.9)):
        sampling = Sampling(temperature, 0, top_p, LIMIT)
        made = generate(llama, [list(ASKED.prompt)], [7], sampling, eos_id=tokenizer.eos_token_id, pad_id=0, slots=1).answers[0]
        ((text, end, _),) = answers(engine, replace(ASKED, temperature=temperature, top_p=top_p)).values()
        assert (text, end.tokens) == (tokenizer.decode(made, skip_special_tokens=True), len(made))


def test_choices_differ_and_the_first_is_that_of_the_seed(engine: Engine) -> None:
    found = answers(engine, replace(ASKED, choices=11))  # more than there are slots
    assert len({text for text, _, _ in found.values()}) > 5
    assert found[0] == answers(engine, ASKED)[0]


def test_log_probs_are_those_of_the_model(engine: Engine, llama: LlamaForCausalLM) -> None:
    ((_, _, tokens),) = answers(engine, replace(ASKED, temperature=0.5, top=3)).values()
    numbers = [token.number for token in tokens]
    with torch.no_grad():
        logits = llama(torch.tensor([[*ASKED.prompt, *numbers]])).logits[0, len(ASKED.prompt) - 1 : -1].log_softmax(-1)
    expected = logits[torch.arange(len(numbers)), numbers]
    torch.testing.assert_close(torch.tensor([token.log_prob for token in tokens]), expected, rtol=1e-4, atol=1e-4)
    assert [[number for number, _ in token.top] for token in tokens] == logits.topk(3).indices.tolist()


def test_an_answer_ends_before_a_text_to_stop_at(engine: Engine) -> None:
    ((whole, _, _),) = answers(engine, ASKED).values()
    stop = whole[len(whole) // 2 :][:3]
    ((text, end, tokens),) = answers(engine, replace(ASKED, stops=(stop, "never"), top=0)).values()
    assert (text, end.finish) == (whole[: whole.index(stop)], "stop")
    assert 0 < len(tokens) <= end.tokens < LIMIT


def test_a_text_to_stop_at_in_what_is_held_back_at_the_end_is_heeded(engine: Engine) -> None:
    found = 0
    for seed in range(40):  # a part of a character is read as unknown once nothing follows it
        asked = replace(ASKED, seed=seed, max_tokens=6, top=0)
        ((whole, end, _),) = answers(engine, asked).values()
        if end.finish == "length" and whole.endswith("\ufffd") and whole.count("\ufffd") == 1:
            ((text, end, tokens),) = answers(engine, replace(asked, stops=("\ufffd",))).values()
            assert (text, end.finish) == (whole[:-1], "stop")
            assert all(token.start < len(text) for token in tokens)
            found += 1
    assert found


def test_each_token_is_told_with_where_its_text_begins(engine: Engine, tokenizer: PreTrainedTokenizerFast) -> None:
    for seed in range(10):
        ((text, _, tokens),) = answers(engine, replace(ASKED, seed=seed, top=0)).values()
        starts = [token.start for token in tokens]
        assert starts == sorted(starts)
        assert starts[0] == 0 < starts[-1] < len(text)
        own = [str(tokenizer.decode([token.number], skip_special_tokens=True)) for token in tokens]
        whole = [(start, said) for start, said in zip(starts, own, strict=True) if "\ufffd" not in said]
        assert len(whole) > 5
        # of a part of a character that none completes it is known only later that it is a character by itself
        assert all(said in text[start : start + len(said) + LONGEST] for start, said in whole)
        before = len(text.partition("\ufffd")[0])
        assert all(text.startswith(said, start) for start, said in whole if start < before)


def test_who_leaves_makes_room(engine: Engine) -> None:
    told: list[Event] = []
    long = replace(ASKED, max_tokens=120, choices=40)
    taken = [engine.submit(long, told.append) for _ in range(40)]
    for asked in taken:
        asked.cancel()
    assert answers(engine, ASKED)[0][1].finish in ("stop", "length")
    ends = [event for event in told if isinstance(event, End)]
    assert len(ends) == 40 * len(taken)
    assert any(end.finish == "cancelled" for end in ends)


def test_an_answer_whose_time_is_over_ends(engine: Engine) -> None:
    (end,) = [event for event in events(engine, replace(ASKED, seconds=-1)) if isinstance(event, End)]
    assert end.finish == "time"


def test_a_fault_ends_what_it_hits_and_nothing_else(engine: Engine) -> None:
    beyond = replace(ASKED, prompt=(10**9,))  # no token
    with ThreadPoolExecutor(9) as at_once:
        found = [*at_once.map(partial(answers, engine), [ASKED, ASKED, beyond] * 3)]
    assert ["error" if end.finish == "error" else "well" for ((_, end, _),) in map(dict.values, found)] == ["well", "well", "error"] * 3
    assert answers(engine, ASKED)[0][1].finish in ("stop", "length")


def test_an_engine_that_closes_answers_what_it_took(folder: Path) -> None:
    engine = Engine(Writer(folder, 2, 128), slots=2, threads=1)
    told: list[Event] = []
    for seed in range(10):
        engine.submit(replace(ASKED, seed=seed), told.append)
    engine.close()
    assert [event.finish for event in told if isinstance(event, End)].count("error") == 0
    assert sum(isinstance(event, End) for event in told) == 10


def test_text_comes_in_whole_characters(tokenizer: PreTrainedTokenizerFast) -> None:
    text = "Grüße, 世界! 🧪🇩🇪 e\u0301 end"
    numbers = tokenizer(text, add_special_tokens=False)["input_ids"]
    found = Text(tokenizer, ())
    pieces = [found.add(number) for number in numbers] + [found.end()]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)
    assert len(list(filter(None, pieces))) > 10


def test_text_that_may_become_a_stop_is_held_back(tokenizer: PreTrainedTokenizerFast) -> None:
    def written(text: str, *stops: str) -> list[str]:
        found = Text(tokenizer, stops)
        pieces = []
        for character in text:
            for number in tokenizer(character, add_special_tokens=False)["input_ids"]:
                if not found.stopped:
                    pieces.append(found.add(number))
        return [*pieces, found.end()]

    assert written("ab###c", "####") == ["a", "b", "", "", "", "###c", ""]
    assert "".join(written("ab####c", "####")) == "ab"
    assert "".join(written("one\n\ntwo", "\n\n", "two")) == "one"
    assert "".join(written("ends in ##", "###")) == "ends in ##"


def test_a_character_that_never_becomes_whole_is_told_as_unknown(tokenizer: PreTrainedTokenizerFast) -> None:
    lone = tokenizer("世", add_special_tokens=False)["input_ids"][0]
    found = Text(tokenizer, ())
    started = time.monotonic()
    assert "\ufffd" in "".join([*(found.add(lone) for _ in range(20)), found.end()])
    assert time.monotonic() - started < 10


def test_what_nobody_waits_for_is_written_while_no_user_waits_in_any_engine(folder: Path) -> None:
    users = Users()
    champion, candidate = (Engine(Writer(folder, 8, 128), slots=8, threads=1, users=users) for _ in range(2))
    shadow = replace(ASKED, background=True, max_tokens=80)
    expected = answers(champion, replace(ASKED, max_tokens=80))
    told: SimpleQueue[Event] = SimpleQueue()
    user_ended: list[float] = []
    taken = champion.submit(replace(ASKED, seed=3, max_tokens=100, stops=()), lambda event: user_ended.append(time.monotonic()))
    begun: list[float] = []

    def deliver(event: Event) -> None:
        begun.append(time.monotonic())
        told.put(event)

    candidate.submit(shadow, deliver)
    heard = [told.get(timeout=30)]
    assert begun[0] > user_ended[-1]
    while not isinstance(heard[-1], End):
        heard.append(told.get(timeout=30))
    assert ("".join(event.text for event in heard if isinstance(event, Piece)), heard[-1]) == expected[0][:2]
    assert taken.ended is None
    assert users.count == 0
    # a user who comes while it is being written goes first, and one that is closed gives it up
    held = Users()
    held.add(1)
    paused = Engine(Writer(folder, 8, 128), slots=8, threads=1, users=held)
    paused.submit(shadow, told.put)
    paused.submit(shadow, told.put)
    assert answers(paused, ASKED)[0][1].finish in ("stop", "length")
    assert told.empty()
    paused.close()
    assert [told.get(timeout=30), told.get(timeout=30)] == [End(0, "cancelled", 0)] * 2
    champion.close()
    candidate.close()
