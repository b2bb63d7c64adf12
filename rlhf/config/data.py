"""Sections data and prepare: where the rows come from, and how they are checked."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from rlhf.config.section import Fraction, NonNegative, Section, Slug

SLICES = ("text", "sft", "reward", "ppo", "judge", "heldout")

# What a row of each kind can be used for: a pair also holds a demonstration (prompt + chosen) and a prompt.
SLICES_OF_KIND: dict[str, frozenset[str]] = {
    "text": frozenset({"text", "heldout"}),
    "prompts": frozenset({"ppo", "heldout"}),
    "messages": frozenset({"text", "sft", "ppo", "heldout"}),
    "pairs": frozenset({"text", "sft", "reward", "ppo", "judge", "heldout"}),
}


class Split(Section):
    """Relative shares in which a source's rows are dealt to the slices, after a seeded shuffle. No row is in two slices."""

    text: NonNegative = Field(description="plain text that the base model is pretrained on and that ppo mixes in")
    sft: NonNegative = Field(description="demonstrations for sft")
    reward: NonNegative = Field(description="preference pairs for the reward model")
    ppo: NonNegative = Field(description="prompts that ppo answers")
    judge: NonNegative = Field(description="pairs for the independent judge of evaluate, where no gold score exists")
    heldout: NonNegative = Field(description="rows that no stage trains on: evaluation reads them")

    def uses(self, slice_name: str) -> bool:
        return getattr(self, slice_name) > 0


class SandboxSource(Section):
    """Rows made by the project itself (rlhf/data/sandbox.py): no file, no download, a known gold score."""

    name: Slug = Field(description="name of the source in logs, metrics and the quarantine file")
    format: Literal["sandbox"]
    kind: Literal["text", "messages", "pairs", "prompts"] = Field(description="what each row is")
    rows: PositiveInt = Field(description="how many rows to make")
    label_noise: Fraction = Field(description="share of pairs whose preference label is flipped (kind pairs only)")
    split: Split


class Columns(Section):
    """Names of the columns (or JSON keys) that the format reads."""

    prompt: str | None = Field(description="pairs: the prompt, text or a message list; null where chosen and rejected hold whole dialogues")
    chosen: str = Field(description="hh, pairs: the preferred answer or dialogue")
    rejected: str = Field(description="hh, pairs: the other answer or dialogue")
    messages: str = Field(description="messages: the list of {role, content}")
    question: str = Field(description="qa: the question")
    answer: str = Field(description="qa: the answer")
    text: str = Field(description="text: the passage")


class FileSource(Section):
    """Rows of a file, a folder written by `datasets`, or a hub dataset."""

    name: Slug = Field(description="name of the source in logs, metrics and the quarantine file")
    format: Literal["hh", "pairs", "messages", "qa", "text"] = Field(description="how a row is read")
    path: str | None = Field(
        description="JSONL, JSON, CSV or Parquet file (also .gz), or a folder of `datasets`, under data/raw; `rlhf use` brings a file "
        "from elsewhere there and versions it with DVC"
    )
    hub: str | None = Field(description="hub id of a dataset, instead of path")
    revision: str | None = Field(description="commit or tag of the hub dataset; required with hub, so that a run can be repeated")
    hub_split: str | None = Field(description="split of the hub dataset or `datasets` folder, for example train")
    columns: Columns
    split: Split

    @property
    def kind(self) -> str:
        return {"hh": "pairs", "pairs": "pairs", "messages": "messages", "qa": "messages", "text": "text"}[self.format]

    @model_validator(mode="after")
    def _one_place(self) -> FileSource:
        if (self.path is None) == (self.hub is None):
            raise ValueError(f"source '{self.name}': give exactly one of path and hub")
        if self.hub is not None and self.revision is None:
            raise ValueError(f"source '{self.name}': hub '{self.hub}' needs a revision (a commit or tag), so that a run can be repeated")
        return self


Source = Annotated[SandboxSource | FileSource, Field(discriminator="format")]


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
    max_quarantined_share: Fraction = Field(description="prepare fails when a source loses a larger share of its rows to quarantine")
