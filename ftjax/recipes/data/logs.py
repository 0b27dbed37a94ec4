"""`ftjax data logs FILE…`: production logs to training examples, every row accounted for."""

from ftjax.data.logs import Logs, parts
from ftjax.recipes.data import VERBS, stage


def main(argv: list[str]) -> int:
    """Runs the verb; raises UserError."""
    return stage.run("logs", VERBS["logs"].about, Logs, argv, parts)
