"""What a run's `data:` block may say."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal


@dataclass(frozen=True)
class DataSource:
    """One file or data set of a mixture."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    path: str
    """A .jsonl, .json, .csv, .parquet or .txt file (.gz too), or the id or folder of a `datasets` data
    set."""
    weight: float | None = None
    """Share of the documents drawn from this source; give it for every source or for none."""
    format: str | None = None
    """The rows' format; detected from the first row's keys if absent."""
    split: str | None = None
    """Split of a `datasets` data set; "train" if absent."""
    name: str | None = None
    """Configuration of a `datasets` data set."""
    columns: dict[str, str] = field(default_factory=dict)
    """Our column name to the file's, e.g. {prompt: question, completion: answer}."""


@dataclass(frozen=True)
class DataOptions:
    """Where the examples come from and how they become tokens, masks and rows."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    train: str | list[DataSource]
    """One path or id, or a list of sources mixed by weight."""
    eval: str | list[DataSource] | None = None
    """Evaluation data, in the same form; instead of it `eval_fraction` splits some off the training data."""
    eval_fraction: float = 0.0
    """Share of the training data kept for evaluation, chosen by a hash of each example's content."""
    format: str | None = None
    """Format of all sources that do not name their own, e.g. chat, sharegpt, prompt_completion, alpaca, text,
    preference, openai_preference, hh or ftjax; detected if absent."""
    max_length: int = 2048
    """Tokens in a row, and the most that an example (for preference data: a pair) may have."""
    packing: Literal["best_fit", "first_fit", "none"] = "best_fit"
    """How examples are put into rows; "none" gives each its own row, padded to the next of `buckets`.
    Streamed data is packed first fit, as it comes, whichever of the two is given."""
    buckets: list[int] = field(default_factory=list)
    """Row lengths to pad to when packing is "none"; each batch has one of them. Empty: only max_length."""
    overlong: Literal["error", "drop", "truncate", "split"] = "error"
    """What happens to an example longer than max_length; "split" is for plain text (with `train_on: all` for
    conversations too) and loses nothing."""
    on_bad: Literal["error", "drop"] = "error"
    """Stop at the first example that can't be trained on, or leave such examples out and count them."""
    chat_template: str | None = None
    """A Jinja file used instead of the tokenizer's template, or "none" to join prompt and completion as
    they are."""
    template_args: dict[str, Any] = field(default_factory=dict)
    """Variables handed to the template, e.g. {enable_thinking: false}."""
    template_date: str = "2024-07-26"
    """The date (YYYY-MM-DD) that templates printing today's see, so that masks and caches do not change
    daily."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """Loss on every assistant turn, on the last one only, or on every token."""
    shuffle: bool = True
    """New order, and new packing, each epoch; false keeps the files' order."""
    streaming: bool = False
    """Read while training instead of tokenising first: no epochs' plan, and resuming reads again all that was
    read before."""
    cache_dir: str | None = None
    """Folder for tokenised data; the environment's FTJAX_CACHE, else ~/.cache/ftjax, if absent."""
