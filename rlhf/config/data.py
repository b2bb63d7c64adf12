"""Sections data and prepare: where the rows come from, and how they are checked."""

from __future__ import annotations

from typing import Annotated, Literal, Self, get_args

from pydantic import Field, PositiveInt, model_validator

from rlhf.config.section import Fraction, NonNegative, PathText, Positive, Section, Slug

SLICES = ("text", "sft", "reward", "ppo", "judge", "heldout")
WEIGHTED = ("text", "sft", "reward", "ppo")  # what the models train on; measuring takes each row once

# What a row of each kind can be used for: a pair also holds a demonstration (prompt + chosen) and a prompt.
SLICES_OF_KIND: dict[str, frozenset[str]] = {
    "text": frozenset({"text", "heldout"}),
    "prompts": frozenset({"ppo", "heldout"}),
    "messages": frozenset({"text", "sft", "ppo", "heldout"}),
    "pairs": frozenset({"text", "sft", "reward", "ppo", "judge", "heldout"}),
    "verifiable": frozenset({"ppo", "heldout"}),
}


class Split(Section):
    """Relative shares in which a source's rows are dealt to the slices, after a seeded shuffle. No row is in two slices."""

    text: NonNegative = Field(description="plain text that the base model is pretrained on and that ppo and grpo mix in")
    sft: NonNegative = Field(description="demonstrations for sft")
    reward: NonNegative = Field(description="preference pairs for the reward model")
    ppo: NonNegative = Field(description="prompts that ppo or grpo answers")
    judge: NonNegative = Field(description="pairs for the independent judge of evaluate, where no gold score exists")
    heldout: NonNegative = Field(description="rows that no stage trains on: evaluation reads them")

    def uses(self, slice_name: str) -> bool:
        return getattr(self, slice_name) > 0


_NAME = "name of the source in logs, metrics and the quarantine file"
_WEIGHT = (
    "passes over this source's rows in one pass over text, sft, reward or ppo: 1 takes each row once, 2.5 each twice and a random half of "
    "them a third time, 0.1 a random tenth; judge and heldout always take each row once"
)


SandboxKind = Literal["opposite", "colour", "capital", "sound", "plural", "category", "home", "next", "young", "maker"]


class SandboxSource(Section):
    """Rows made by the project itself (rlhf/data/sandbox.py): no file, no download, a known gold score."""

    name: Slug = Field(description=_NAME)
    format: Literal["sandbox"]
    kind: Literal["text", "messages", "pairs", "prompts", "verifiable"] = Field(
        description="what each row is; verifiable: a prompt with the right answer as its reference"
    )
    kinds: Annotated[list[SandboxKind], Field(min_length=1)] | None = Field(
        description="kinds of tasks that its rows are of, not for kind text; null: all ten"
    )
    rows: PositiveInt = Field(description="how many rows to make")
    label_noise: Fraction = Field(description="share of pairs whose preference label is flipped (kind pairs only)")
    split: Split
    weight: Positive = Field(description=_WEIGHT)

    @model_validator(mode="after")
    def _text_is_of_no_kind(self) -> Self:
        if self.kinds and self.kind == "text":
            raise ValueError(f"source '{self.name}': kinds must be null for text, which is of all kinds")
        return self


class Columns(Section):
    """Names of the columns (or JSON keys) that the format reads."""

    prompt: str | None = Field(
        description="pairs, prompts: the prompt, text or a message list; null where chosen and rejected hold whole dialogues"
    )
    chosen: str = Field(description="hh, pairs: the preferred answer or dialogue")
    rejected: str = Field(description="hh, pairs: the other answer or dialogue")
    messages: str = Field(description="messages: the list of {role, content}")
    question: str = Field(description="qa: the question")
    answer: str = Field(description="qa: the answer")
    text: str = Field(description="text: the passage")


class FileSource(Section):
    """Rows of a file, a folder written by `datasets`, or a hub dataset."""

    name: Slug = Field(description=_NAME)
    path: PathText | None = Field(
        description="JSONL, JSON, CSV, TSV, Parquet or Arrow file (also packed as .gz, .bz2, .xz or .zst), a folder of such files, or a "
        "folder of `datasets`, under data/raw; "
        "`rlhf use` brings a file from elsewhere there and versions it with DVC, `rlhf ingest` adds a further one"
    )
    hub: str | None = Field(description="hub id of a dataset, instead of path")
    revision: str | None = Field(description="commit or tag of the hub dataset; required with hub, so that a run can be repeated")
    hub_split: str | None = Field(
        description="split of the hub dataset or of the folder, for example train; in a folder of files their names tell it"
    )
    split: Split
    weight: Positive = Field(description=_WEIGHT)

    @model_validator(mode="after")
    def _one_place(self) -> Self:
        if (self.path is None) == (self.hub is None):
            raise ValueError(f"source '{self.name}': give exactly one of path and hub")
        if self.hub is not None and self.revision is None:
            raise ValueError(f"source '{self.name}': hub '{self.hub}' needs a revision (a commit or tag), so that a run can be repeated")
        return self


class ColumnSource(FileSource):
    """Rows of a file, a folder written by `datasets`, or a hub dataset, with columns of any name."""

    format: Literal["hh", "pairs", "messages", "qa", "prompts", "text"] = Field(description="how a row is read")
    columns: Columns

    @property
    def kind(self) -> str:
        return {"hh": "pairs", "qa": "messages"}.get(self.format, self.format)


class VerifiableColumns(Section):
    """Names of the columns (or JSON keys) that the format reads; reward functions get all others too."""

    prompt: str = Field(description="the prompt, text or a message list")
    reference: str = Field(description="what is right: any JSON value, for reward functions to compare an answer with")


class VerifiableSource(FileSource):
    """Prompts whose answers a program can check, with columns of any name."""

    format: Literal["verifiable"] = Field(description="how a row is read")
    columns: VerifiableColumns

    @property
    def kind(self) -> str:
        return "verifiable"


PairsDataset = Literal[
    "rm-static",
    "full-hh-rlhf",
    "synthetic-instruct-gptj-pairwise",
    "rlhf-reward-datasets",
    "webgpt",
    "shp",
    "miracl",
    "nectar",
    "ultrafeedback",
    "helpsteer",
    "helpsteer2-preference",
    "helpsteer3",
    "openai-preference",
]
MessagesDataset = Literal[
    "kto", "alpaca", "sharegpt", "vicuna", "oasst", "zhihu-kol", "hc3", "mkqa-zh", "mkqa-ja", "qg-jaquad", "qag-jaquad"
]
VerifiableDataset = Literal[
    "gsm8k",
    "math",
    "dapo-math",
    "verl",
    "problem-answer",
    "big-math",
    "openr1-math",
    "deepmath",
    "webinstruct-verified",
    "rlvr",
    "ifeval",
]


class NamedSource(FileSource):
    """Rows of a public dataset, read by its own columns (rlhf/data/named.py)."""

    format: Literal[PairsDataset, MessagesDataset, VerifiableDataset] = Field(description="which dataset it is")

    @property
    def kind(self) -> str:
        kinds = {"pairs": PairsDataset, "messages": MessagesDataset, "verifiable": VerifiableDataset}
        return next(kind for kind, datasets in kinds.items() if self.format in get_args(datasets))


Source = Annotated[SandboxSource | ColumnSource | VerifiableSource | NamedSource, Field(discriminator="format")]


class Data(Section):
    sources: list[Source] = Field(min_length=1, description="where the rows come from")

    @model_validator(mode="after")
    def _sources(self) -> Data:
        names = [source.name for source in self.sources]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"two sources are named '{name}': give each its own name")
        for source in self.sources:
            for slice_name in SLICES:
                if source.split.uses(slice_name) and slice_name not in SLICES_OF_KIND[source.kind]:
                    usable = ", ".join(s for s in SLICES if s in SLICES_OF_KIND[source.kind])
                    raise ValueError(
                        f"source '{source.name}': rows of format {source.format} ({source.kind}) cannot be used for split.{slice_name}; "
                        f"set it to 0 (usable: {usable})"
                    )
            if not any(source.split.uses(s) for s in SLICES):
                raise ValueError(f"source '{source.name}': every share of its split is 0, so that no row would be used")
        return self

    def feeding(self, slice_name: str) -> list[Source]:
        """The sources that give rows to a slice."""
        return [source for source in self.sources if source.split.uses(slice_name)]

    @property
    def has_gold(self) -> bool:
        """Whether every held-out prompt comes with a gold score."""
        return all(source.format == "sandbox" for source in self.feeding("heldout") if source.kind != "text")


class Prepare(Section):
    max_characters: PositiveInt = Field(description="a row with a longer dialogue or passage is quarantined as over-long")
    max_quarantined_share: Fraction = Field(
        description="prepare fails when a larger share of a source's rows is damaged; ties, questions without an answer, lone or "
        "undesirable answers and rows of an earlier source go to quarantine too, but are no damage"
    )
