"""What a run's `checkpoint:` block may say; apart from ftjax.checkpoint, for a plan needs no Orbax."""

import dataclasses
from typing import ClassVar

from ftjax import bucket
from ftjax.errors import UserError


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """When to save, and how many to keep."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """Newest checkpoints kept, at least 2: the one before goes only after the newest was read back. The best
    one by evaluation is kept besides."""
    directory: str | None = None
    """Where they lie: a folder that all hosts see, or a bucket (gs://BUCKET/PATH, s3://BUCKET/PATH); not
    given: checkpoints/ in the run folder."""

    def __post_init__(self):
        if self.directory is not None:
            bucket.scheme(self.directory)
        if self.keep < 2:
            raise UserError(
                f"checkpoint.keep={self.keep}: at least 2, so that a damaged one has one before it"
            )
        if self.every < 1:
            raise UserError(f"checkpoint.every={self.every}: at least 1 step")
