"""What stands in the place of data: files of other kinds and encodings, known by their first bytes whatever their name says."""

from __future__ import annotations

from collections.abc import Collection

UNPACK = "take out the data file (`unzip`, `tar -xf`, `7z x`), and give that"
EXPORT = "write its rows to a JSONL, CSV or Parquet file, and give that"
_ICONV = "`iconv -f {encoding} -t UTF-8 FILE > NEW`"
CONVERT = f"write it as UTF-8: {_ICONV}"
# how a file begins, from where on: what it is, and what to do
_KINDS = (
    (b"version https://git-lfs", 0, "a pointer of git-lfs, not the data", "`git lfs pull` where it comes from"),
    (b"PK\x03\x04", 0, "a zip archive, or a table of Excel", f"{UNPACK}; export a table as CSV"),
    (b"PK\x05\x06", 0, "an empty zip archive", UNPACK),
    (b"7z\xbc\xaf\x27\x1c", 0, "a 7z archive", UNPACK),
    (b"Rar!\x1a\x07", 0, "a rar archive", UNPACK),
    (b"ustar", 257, "a tar archive", UNPACK),
    (b"\x04\x22\x4d\x18", 0, "packed by lz4", "`unlz4 FILE`, or pack it as .gz, .bz2, .xz or .zst"),
    (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", 0, "a table or text of an old Office", "export it as CSV"),
    (b"%PDF-", 0, "a PDF", EXPORT),
    (b"SQLite format 3\0", 0, "a database of SQLite", EXPORT),
    (b"\x89HDF\r\n\x1a\n", 0, "an HDF5 file", EXPORT),
    (b"Obj\x01", 0, "an Avro file", EXPORT),
    (b"FEA1\0\0\0\0", 0, "a Feather file of the first version", EXPORT),
    (b"\x93NUMPY", 0, "an array of numpy", EXPORT),
    *((bytes((0x80, version)), 0, "a pickle of Python, which could run code", EXPORT) for version in (2, 3, 4, 5)),
    (b"\xff\xfe\0\0", 0, "UTF-32", CONVERT.format(encoding="UTF-32")),
    (b"\xff\xfe", 0, "UTF-16", CONVERT.format(encoding="UTF-16")),
    (b"\xfe\xff", 0, "UTF-16", CONVERT.format(encoding="UTF-16")),
)
TO_UTF8 = f"write a file in another encoding as UTF-8: {_ICONV.format(encoding='WINDOWS-1252')}"
_SHARE = 0.05  # of zero bytes, which no other text has


def kind_of(start: bytes, *, is_text: bool) -> tuple[str, str] | None:
    """What a file is whose rows cannot be read, and what to do about it; None where it may be data.

    Args:
        start: some of its first bytes.
        is_text: whether it is to be text, by its name.
    """
    for mark, place, what, remedy in _KINDS:
        if start[place : place + len(mark)] == mark:
            return what, remedy
    if start.lstrip().lower().startswith((b"<!doctype html", b"<html")):
        return "a web page, not the data", "download the file itself, in its raw form"
    zeros = [start[: 1 << 12][half::2].count(0) for half in (0, 1)]
    if is_text and sum(zeros) > _SHARE * min(len(start), 1 << 12):
        encoding = "UTF-32LE" if all(zeros) else "UTF-16BE" if zeros[0] else "UTF-16LE"
        return f"{encoding[:6]} or no text at all", CONVERT.format(encoding=encoding)
    return None


def mend(reasons: Collection[str], *, all_rows: bool) -> str:
    """What to do about damaged rows.

    Args:
        reasons: the categories of what is wrong with them.
        all_rows: whether a source has no others.
    """
    of_reason = {
        "not UTF-8": TO_UTF8,
        "over-long": "of rows that are over-long, raise prepare.max_characters",
    }
    last = "set another format, or other columns, for a source without a good row" if all_rows else "raise prepare.max_quarantined_share"
    return "; ".join(
        ["correct the data", *(remedy for reason, remedy in of_reason.items() if reason in reasons), f"or {last} in params.yaml"]
    )
