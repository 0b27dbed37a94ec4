"""Every code a verdict may have: its short name, how grave it is, and what usually sets it right.

E codes are about the form of a row and W codes about what is unusual in it (both: the table of
docs/data.md); the other letters belong to the step that gives them: F filter, P personal data and secrets,
D duplicates, C contamination, S synthesis, X extraction, L logs.
"""

from typing import Literal, NamedTuple

Severity = Literal["error", "warning", "note"]


class Code(NamedTuple):
    name: str
    severity: Severity
    fix: str


CODES: dict[str, Code] = {
    # ── form ──
    "E001": Code("utf8", "error", "save the file as UTF-8"),
    "E002": Code("json", "error", "write one JSON object a line"),
    "E003": Code("not_object", "error", "each row has to be a JSON object"),
    "E004": Code("mixed_formats", "error", "put the formats into files of their own, or name one"),
    "E005": Code("duplicate_key", "error", "keep one of the values"),
}
