"""The step `convert`: records as another format can say them."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from ftjax.data import formats
from ftjax.data.record import Judged, Record
from ftjax.data.steps import Step


@dataclass(frozen=True)
class ConvertOptions:
    """What rows are converted to."""

    __pydantic_config__: ClassVar = {"extra": "forbid", "use_attribute_docstrings": True}

    to: str
    """The format: ftjax, openai, openai_preference, openai_rft, azure, together, fireworks, mistral, chat,
    text, prompt_only, prompt_completion, preference, unpaired, stepwise, alpaca, sharegpt, hh or qa."""


class Convert(Step):
    """Records of the tasks that the format has (a pair may become two unpaired answers); what it can't say
    at all ends, and what a record loses is a warning."""

    Options = ConvertOptions
    name = "convert"

    def __init__(self, options: ConvertOptions):
        super().__init__(options)
        self.writes = formats.format_named(options.to).name

    def apply(self, records: Iterable[Record], decision: Any, part: int) -> Iterator[Judged]:
        format, write = formats.FORMATS[self.options.to], formats.writer(self.options.to)
        for record in records:
            written = write(record)
            if written.refused:
                yield Judged(None, [record.verdict(*written.refused)])
                continue
            lost = "; ".join(formats.LOSSES[name] for name in written.losses)
            said = [record.verdict("W118", f"lost: {lost}")] if lost else []
            made, _, _ = formats.cast(record, format)
            for number, one in enumerate(made):
                yield Judged(one, said if number == 0 else [], changed=one is not record)
