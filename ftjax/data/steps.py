"""A step over a data set of any size: facts of each part, one decision over all, then each part once more.

What can be decided row by row (filters of one row, masking, conversion) is only `apply`. What needs the
whole (duplicates, splits, a selection) gathers small `facts` of each part, in parallel, makes one `decision`
of them in one place, and applies it to each part, in parallel again. Both functions see one part at a time,
so that an engine (ftjax.data.engine) may run them in processes or on a cluster with the same result.
"""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

from ftjax.data.record import Judged, Record


class Part(Protocol):
    """A piece of a data set that one process reads at a time; picklable, and small itself."""

    def key(self) -> str:
        """A hash of its content and of how it is read: equal keys, equal records."""
        ...

    def judged(self) -> Iterator[Judged]:
        """Its rows in order: a record, with what reading it had to say, or None with what is wrong with
        it."""
        ...


class Step:
    """One stage. A subclass is made of its frozen options, `Step(options)`, and is picklable."""

    name: str = ""
    """The verb, and the key in a recipe."""
    version: int = 1
    """Raised when the same input gives another result than before, so that old caches are not used."""
    gathers: bool = False
    """Whether `facts` and `decide` are wanted."""
    alone: bool = False
    """Whether its parts are worked on one after another in the calling process, whatever the engine: it holds
    a model, or the limits of an endpoint."""
    Options: type
    """The dataclass of its options, of which the command line and recipes are made."""
    writes: str | None = None
    """The format that a verb writes where none is asked for; the input's if None."""
    folder: Path | None = None
    """Where large facts may be left between `facts` and `apply`; set by the pipeline, on storage that every
    worker sees."""

    def __init__(self, options: Any):
        self.options = options

    def reads(self) -> Sequence[str | Path]:
        """Files, other than the parts, whose content the result depends on."""
        return ()

    def facts(self, records: Iterable[Record], part: int) -> Any:
        """What the decision needs of part number `part`; small beside the part, picklable."""

    def decide(self, facts: Sequence[Any]) -> Any:
        """The decision over the parts' facts, in the parts' order; picklable, and read by every part."""

    def apply(self, records: Iterable[Record], decision: Any, part: int) -> Iterator[Judged]:
        """What becomes of each record of part number `part`, in order; one record may become several."""
        raise NotImplementedError

    def summary(self, decision: Any) -> dict[str, Any]:
        """What the report says of the decision, beside the counts of verdicts ("numbers": not printed)."""
        return {}
