"""Built-in function `instructions`: checkable instructions, with the names and arguments of IFEval (arXiv 2311.07911).

Known differences: sentences are cut at their end marks, where IFEval asks nltk's tokenizer; the language is told by py3langid; keywords are
whole words; an answer in capital or small letters may be in any language.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from rlhf.rewards.answers import NOTHING, loaded

Check = Callable[..., bool]


def instructions(answer: str, reference: Any, whole: bool = False) -> float:
    """The share of the row's instructions that an answer follows.

    Args:
        reference: ``{"instruction_id_list": [NAME, …], "kwargs": [{…}, …]}``, as the hub's IFEval sets have it.
        whole: 1 where it follows all of them, else 0.

    Raises:
        ValueError: the reference has another form, or an instruction is unknown or lacks an argument.
    """
    try:
        names, arguments = reference["instruction_id_list"], reference["kwargs"]
        asked = list(zip(names, arguments, strict=True))
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"the row's reference {reference!r} has no instruction_id_list and kwargs of one length") from None
    followed = [follows(answer, name, given or {}) for name, given in asked]
    if not followed:
        raise ValueError("the row's reference has no instruction")
    return float(all(followed)) if whole else sum(followed) / len(followed)


def follows(answer: str, name: str, arguments: dict[str, Any]) -> bool:
    """Whether an answer follows one instruction.

    Raises:
        ValueError: it is unknown, or lacks an argument.
    """
    if name not in CHECKS:
        raise ValueError(f"unknown instruction {name!r}; known are {', '.join(CHECKS)}")
    given = {key: value for key, value in arguments.items() if value is not None}  # the hub's sets have a column for each argument
    try:
        return bool(answer.strip()) and CHECKS[name](answer, **given)
    except TypeError as error:
        raise ValueError(f"instruction {name}: {error}") from None


def _compare(count: int, wanted: float, relation: str) -> bool:
    relations = {
        "at least": count >= wanted,
        "less than": count < wanted,
        "at most": count <= wanted,
        "exactly": count == wanted,
        "around": abs(count - wanted) <= max(round(wanted * 0.1), 1),
    }
    if relation not in relations:
        raise ValueError(f"relation {relation!r} is none of {', '.join(relations)}")
    return relations[relation]


# --------------------------------------------------------------------------------------------------------------- counted


def sentences(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?。！？])[\"')\]]*\s+|(?<=[。！？])", text.strip()) if part.strip()]


def _words(text: str) -> list[str]:
    return re.findall(r"\w+", text)


def _number_words(answer: str, num_words: int, relation: str = "at least") -> bool:
    return _compare(len(_words(answer)), num_words, relation)


def _number_sentences(answer: str, num_sentences: int, relation: str = "at least") -> bool:
    return _compare(len(sentences(answer)), num_sentences, relation)


def _number_paragraphs(answer: str, num_paragraphs: int) -> bool:
    """Paragraphs that *** divides, or * * *, as the prompts of open-instruct's sets have it."""
    return _between(r"\s?\* ?\* ?\*\s?", answer, num_paragraphs) is not None


def _between(divider: str, answer: str, count: int) -> list[str] | None:
    """The parts of an answer, one of which may be missing before the first divider and behind the last; None where they are not so many."""
    parts = [part.strip() for part in re.split(divider, answer)]
    inner = parts[1 if not parts[0] else 0 : -1 if not parts[-1] else None]
    return inner if all(inner) and len(inner) == count else None


def _first_word(answer: str, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Paragraphs that empty lines divide."""
    parts = [part.strip() for part in answer.split("\n\n") if part.strip()]
    if len(parts) != num_paragraphs or not 1 <= nth_paragraph <= len(parts):
        return False
    first = parts[nth_paragraph - 1].split()[0].lstrip("'\"").lower()
    return re.split(r"[.,?!'\"]", first)[0] == first_word.lower()


def _letter_frequency(answer: str, letter: str, let_frequency: int, let_relation: str = "at least") -> bool:
    return _compare(answer.lower().count(letter.lower()), let_frequency, let_relation)


def _capital_words(answer: str, capital_frequency: int, capital_relation: str = "at least") -> bool:
    return _compare(sum(word.isupper() for word in _words(answer)), capital_frequency, capital_relation)


def _bullets(answer: str, num_bullets: int) -> bool:
    return len(re.findall(r"^\s*(?:\*[^*].*|-.*)$", answer, re.MULTILINE)) == num_bullets


def _highlights(answer: str, num_highlights: int) -> bool:
    twice = re.findall(r"\*\*([^\n*]*)\*\*", answer)
    once = re.findall(r"\*([^\n*]+)\*", re.sub(r"\*\*[^\n*]*\*\*", "", answer))
    return sum(bool(part.strip()) for part in (*twice, *once)) >= num_highlights


def _sections(answer: str, num_sections: int, section_spliter: str) -> bool:
    return len(re.split(rf"\s?{re.escape(section_spliter.strip())}\s?\d+\s?", answer)) - 1 >= num_sections


def _placeholders(answer: str, num_placeholders: int) -> bool:
    return len(re.findall(r"\[.*?\]", answer)) >= num_placeholders


# ---------------------------------------------------------------------------------------------------------------- words


def _has(answer: str, word: str) -> int:
    return len(re.findall(rf"(?<!\w){re.escape(word)}(?!\w)", answer, re.IGNORECASE))


def _keywords(answer: str, keywords: list[str]) -> bool:
    return all(_has(answer, word) for word in keywords)


def _frequency(answer: str, keyword: str, frequency: int, relation: str = "at least") -> bool:
    return _compare(_has(answer, keyword), frequency, relation)


def _forbidden(answer: str, forbidden_words: list[str]) -> bool:
    return not any(_has(answer, word) for word in forbidden_words)


def _postscript(answer: str, postscript_marker: str) -> bool:
    return postscript_marker.lower().replace(" ", "") in answer.lower().replace(" ", "")


def _repeats(answer: str, prompt_to_repeat: str) -> bool:
    return answer.strip().lower().startswith(prompt_to_repeat.strip().lower())


def _ends(answer: str, end_phrase: str) -> bool:
    return answer.strip().strip('"').lower().endswith(end_phrase.strip().lower())


def _starts(answer: str, start_phrase: str) -> bool:
    return answer.strip().strip('"').lower().startswith(start_phrase.strip().lower())


def _quotation(answer: str) -> bool:
    text = answer.strip()
    return len(text) > 1 and text[0] == text[-1] == '"'


def _constrained(answer: str, options: list[str] | None = None) -> bool:
    allowed = options or ["My answer is yes.", "My answer is no.", "My answer is maybe."]
    return any(option.lower() in answer.lower() for option in allowed)


def _two_responses(answer: str) -> bool:
    parts = _between(r"\*{6}", answer, 2)
    return parts is not None and parts[0] != parts[1]


def _language(answer: str, language: str) -> bool:
    import py3langid

    return py3langid.classify(answer)[0] == language.lower()[:2]


def _cased(answer: str, case: str) -> bool:
    return answer.isupper() if case == "upper" else answer.islower()


CHECKS: dict[str, Check] = {
    "keywords:existence": _keywords,
    "keywords:frequency": _frequency,
    "keywords:forbidden_words": _forbidden,
    "keywords:letter_frequency": _letter_frequency,
    "language:response_language": _language,
    "length_constraints:number_sentences": _number_sentences,
    "length_constraints:number_paragraphs": _number_paragraphs,
    "length_constraints:number_words": _number_words,
    "length_constraints:nth_paragraph_first_word": _first_word,
    "detectable_content:number_placeholders": _placeholders,
    "detectable_content:postscript": _postscript,
    "detectable_format:number_bullet_lists": _bullets,
    "detectable_format:constrained_response": _constrained,
    "detectable_format:number_highlighted_sections": _highlights,
    "detectable_format:multiple_sections": _sections,
    "detectable_format:json_format": lambda answer: loaded(answer) is not NOTHING,
    "detectable_format:title": lambda answer: any(part.strip() for part in re.findall(r"<<([^\n]+?)>>", answer)),
    "combination:two_responses": _two_responses,
    "combination:repeat_prompt": _repeats,
    "startend:end_checker": _ends,
    "startend:start_checker": _starts,
    "startend:quotation": _quotation,
    "change_case:capital_word_frequency": _capital_words,
    "change_case:english_capital": lambda answer: _cased(answer, "upper"),
    "change_case:english_lowercase": lambda answer: _cased(answer, "lower"),
    "punctuation:no_comma": lambda answer: "," not in answer,
}
