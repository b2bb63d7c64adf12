"""Files as they come, and worse: made from a seed, mutated as values, as rows and as bytes; and a second reading of them, by other means.

`trial(seed, folder)` makes one file, reads it, and raises where the reader fails otherwise than by a UserError, loses a row, or takes one
with another content than the file has.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
from collections import Counter
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from random import Random
from typing import Any

import pyarrow
import pyarrow.ipc
import pyarrow.parquet

from rlhf.config.data import NamedSource
from rlhf.data.examples import as_example
from rlhf.data.formats import Quarantined, Row, read
from rlhf.data.validate import Checker
from rlhf.errors import UserError
from rlhf.stages.prepare import as_text
from tests.data.second_reading import differs
from tests.data.test_formats import NOTHING, source, zstd
from tests.data.test_named import ROWS

Record = dict[str, Any]
WORDS = ["Why?", "So.", "富士山は", "高い：3776 m", "a, b; c", '"quoted"', "tab\there", "line\nline", "two\n\nlines", "🙂", "é", "\u2028"]
WORDS += ["[{", "{}", "Human:", "Assistant:", "\n\nHuman: no", "用户：", "NaN", "null", "0", "-1", "<|end|>", "{{ x }}", "\\n", "\x00"]
WORDS += ["\x1b[0m", " ", "C:\\", "'"]
KINDS = ("hh", "pairs", "messages", "qa", "text")
NAMES = tuple(name for name in ROWS if name != "oasst")
ODD: list[Any] = [None, True, 0, 1, -1, 0.5, 1e308, "", " ", [], {}, [[]], [{}], "\ud800", "x", 10**25, {"role": "user"}, [None]]
ODD += [float("nan"), "DEEP"]
DEPTHS = (50, 500, 900, 960, 990, 1010, 100_000)  # of lists in lists, around what Python takes and far beyond
FIELDS = ["weight", "loss", "train", "mood", "name", "mask", "tool_calls", "system", "tools", "images", "content", "role", "from"]
FIELDS += ["value", "a" * 9]
SPEAKERS = [("Human", "Assistant", ":"), ("User", "Assistant", "："), ("用户", "助手", "："), ("人間", "アシスタント", ":")]
BYTES = [b"\n", b'"', b"{", b"]", b",", b"\\", b"\xef\xbb\xbf", b"\r\n", b"\t", b"\x00", b"\xff", b"[{", b"\n\n"]


def text(random: Random) -> str:
    return " ".join(random.choices(WORDS, k=random.randint(1, 4)))


def turns(random: Random) -> list[Record]:
    who, said = random.choice([("role", "content"), ("from", "value")])
    names = {"user": "user" if who == "role" else "human", "assistant": "assistant" if who == "role" else "gpt"}
    made: list[Record] = [{who: "system", said: text(random)}] if random.random() < 0.2 else []
    for _ in range(random.randint(1, 3)):
        made.append({who: names["user"], said: text(random)})
        if random.random() < 0.15:
            call = {"name": "f", "arguments": random.choice(['{"x": 1}', {"x": "y"}, "{}", '{"x": "\\ud800"}'])}
            made.append({who: names["assistant"], said: None, "tool_calls": random.choice([[{"function": call}], [call]])})
            made.append({who: "tool", said: text(random)})
        mark = {random.choice(["weight", "loss", "trainable"]): random.choice([0, 1, True, False])} if random.random() < 0.3 else {}
        parts = [{"type": "text", "text": text(random)}] if random.random() < 0.1 else text(random)
        made.append({who: names["assistant"], said: parts, **mark})
    return made


def record(random: Random, form: str) -> Record:
    if form == "hh":
        user, assistant, colon = random.choice(SPEAKERS)
        said = [f"\n\n{who}{colon} {text(random)}" for who in (user, assistant, user)]
        start = f"{''.join(said)}\n\n{assistant}{colon} "
        return {"chosen": start + text(random), "rejected": start + text(random)}
    if form == "pairs":
        asked = random.choice([text(random), [{"role": "user", "content": text(random)}]])
        sides = [random.choice([answer, [{"role": "assistant", "content": answer}]]) for answer in (text(random), text(random))]
        return {"prompt": asked, "chosen": sides[0], "rejected": sides[1]}
    if form == "messages":
        return {"messages": turns(random)}
    if form == "qa":
        return {"question": text(random), "answer": text(random)}
    if form == "text":
        return {"text": text(random)}
    return deepcopy(ROWS[form][0])


# --------------------------------------------------------------------------------------------------------------- mutations


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every holder of a value, with the key or number of it."""
    for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def mutate(random: Random, row: Record) -> None:
    """Change a value somewhere in a record, add one, rename one, or take one away."""
    holder, key = random.choice(list(places(row)) or [(row, "new")])
    kind = random.randrange(6)
    if kind == 0:
        holder[key] = deepcopy(random.choice(ODD))
    elif kind == 1:
        holder.pop(key) if isinstance(holder, list) or key in holder else None
    elif kind == 2 and isinstance(holder, dict):
        holder[random.choice(FIELDS)] = deepcopy(random.choice([*ODD, text(random)]))
    elif kind == 3 and isinstance(holder, dict) and key in holder:
        holder[random.choice(FIELDS)] = holder.pop(key)
    elif kind == 4 and isinstance(holder, list):
        holder.insert(random.randint(0, len(holder)), deepcopy(random.choice([*holder, *ODD])))
    elif isinstance(holder, list) or key in holder:
        holder[key] = text(random)


def damage(random: Random, content: bytes) -> bytes:
    """Change bytes of a file."""
    changed = bytearray(content)
    for _ in range(random.randint(1, 4)):
        place, width = random.randint(0, len(changed)), random.choice([1, 1, 2, 5, 40])
        kind = random.randrange(5)
        if kind == 0:
            changed[place : place + width] = random.randbytes(width)
        elif kind == 1:
            del changed[place : place + width]
        elif kind == 2:
            changed[place:place] = random.choice(BYTES)
        elif kind == 3:
            changed[place:place] = changed[place : place + width]
        else:
            del changed[len(changed) - width :]
    return bytes(changed)


# ------------------------------------------------------------------------------------------------------------------- files


def as_jsonl(rows: list[Record]) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode("utf-8", "surrogatepass")


def as_json(rows: list[Record]) -> bytes:
    return json.dumps(rows).encode()


def as_indented(rows: list[Record]) -> bytes:
    return json.dumps({"data": rows}, indent=1).encode()


def as_table(rows: list[Record], delimiter: str) -> bytes:
    columns = list(dict.fromkeys(name for row in rows for name in row))
    stream = io.StringIO()
    writer = csv.writer(stream, delimiter=delimiter)
    writer.writerow(columns)
    for row in rows:
        writer.writerow([value if isinstance(value := row.get(name, ""), str) else json.dumps(value) for name in columns])
    return stream.getvalue().encode("utf-8", "surrogatepass")


def as_arrow(rows: list[Record], parquet: bool) -> bytes:
    sink = pyarrow.BufferOutputStream()
    names = dict.fromkeys(name for row in rows for name in row)
    table = pyarrow.Table.from_pylist([dict.fromkeys(names) | row for row in rows])
    if parquet:
        pyarrow.parquet.write_table(table, sink)
    else:
        with pyarrow.ipc.new_file(sink, table.schema) as file:
            file.write_table(table)
    return bytes(sink.getvalue())


WRITERS: dict[str, Callable[[list[Record]], bytes]] = {
    "jsonl": as_jsonl,
    "json": as_json,
    "indented": as_indented,
    "csv": lambda rows: as_table(rows, ","),
    "tsv": lambda rows: as_table(rows, "\t"),
    "parquet": lambda rows: as_arrow(rows, True),
    "arrow": lambda rows: as_arrow(rows, False),
}
PACK: dict[str, Callable[[bytes], bytes]] = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}
# of content and name, what else people have
MISNAMED = {"jsonl": ["json", "ndjson", "jsonl"], "json": ["jsonl", "json"], "indented": ["json", "jsonl"]}
MISNAMED |= {"csv": ["csv", "tsv"], "tsv": ["tsv", "csv"]}


def trial(seed: int, folder: Path) -> Counter[str]:
    """Make a file, read it, compare; how many rows were taken, kept in quarantine, or in a file that was refused."""
    random = Random(seed)
    form = random.choice((*KINDS * 6, *NAMES))
    rows = [record(random, form) for _ in range(random.randint(1, 4))]
    for _ in range(random.choice([0, 1, 1, 2, 5])):
        mutate(random, random.choice(rows))
    writer = random.choice(["jsonl", "jsonl", *WRITERS])
    try:
        content = WRITERS[writer](rows)
    except (pyarrow.ArrowException, UnicodeEncodeError, OverflowError):  # what this kind of file cannot hold
        writer, content = "jsonl", as_jsonl(rows)
    whole = b'"DEEP"' not in content and random.random() < 0.5
    depth = random.choice(DEPTHS)
    content = content.replace(b'"DEEP"', b"[" * depth + b"]" * depth)
    if not whole and random.random() < 0.9:
        content = damage(random, content)
    if writer in ("csv", "tsv"):
        rows = [{name: row.get(name, "") for name in dict.fromkeys(name for row in rows for name in row)} for row in rows]
    packing = random.choice(["", "", "", *PACK])
    name = f"rows.{random.choice(MISNAMED.get(writer, [writer]))}{packing}"
    path = folder / name
    packed = PACK[packing](content)
    if random.random() < 0.05:
        whole, packed = False, damage(random, packed)
        content = content if packing else packed
    path.write_bytes(packed)
    return compare(form, writer, rows if whole else None, content, path)


def compare(form: str, writer: str, rows: list[Record] | None, content: bytes, path: Path) -> Counter[str]:
    where = source(form, path.name) if form in KINDS else named(form, path.name)
    try:
        found = list(read(where, "data.sources.0", path.parent, 1))
    except UserError as error:
        if not (error.what and error.remedy):
            raise AssertionError("it is refused without a word") from None
        return Counter(refused=1)
    if rows is not None and len(rows) != len(found) and not (writer in ("csv", "tsv") and not all(rows)):
        raise AssertionError(f"{len(rows)} rows were written and {len(found)} read")
    checker = Checker(10_000)
    for number, row in enumerate(found):
        if isinstance(row, Quarantined):
            json.dumps(vars(row), ensure_ascii=False, default=str).encode("utf-8", "backslashreplace")
            assert row.reason
            continue
        if checker.problem(row):
            continue
        json.dumps([as_example(row), *([as_text(row)] if row.text or row.chosen is not None else [])], ensure_ascii=False).encode()
        if what := differs(form, writer, rows[number] if rows is not None else None, content, row):
            raise AssertionError(f"{row} is not what the file has: {what}")
    return Counter("taken" if isinstance(row, Row) else "quarantined" for row in found)


def named(form: str, path: str) -> NamedSource:
    place = {"path": path, "hub": None, "revision": None, "hub_split": None}
    return NamedSource.model_validate({"name": "named", "format": form, "split": NOTHING, "weight": 1, **place})
