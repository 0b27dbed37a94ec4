"""The verb `ftjax data`: from raw examples, logs or documents to a training set, with its proof."""

import difflib
import importlib
from typing import NamedTuple

from ftjax.errors import UserError


class Verb(NamedTuple):
    about: str
    module: str
    """Whose `main(argv)` it is; a verb of STEPS has none."""


class StepVerb(NamedTuple):
    about: str
    step: str
    """ "module:class" of the Step; its options class is the Step's `Options`."""


STEPS: dict[str, StepVerb] = {
    "validate": StepVerb(
        "check rows by the rules of what they are for, each complaint with its place and remedy",
        "ftjax.data.validate:Validate",
    ),
    "filter": StepVerb(
        "leave out or flag answers that are empty, refused, cut off, looping, broken …",
        "ftjax.data.filter:Filter",
    ),
    "contam": StepVerb(
        "find benchmarks' items, and the set's own test rows, in the training rows",
        "ftjax.data.contamination:Contam",
    ),
    "dedup": StepVerb(
        "find duplicates, exact, near or in meaning, and keep one of each", "ftjax.data.dedup:Dedup"
    ),
    "mix": StepVerb("draw several sources in given shares", "ftjax.data.mix:Mix"),
    "personal": StepVerb("find personal data and secrets, and mask them", "ftjax.data.personal:Personal"),
    "convert": StepVerb(
        "rows of any format to any other, and what they lose on the way", "ftjax.data.convert:Convert"
    ),
    "split": StepVerb(
        "train, eval and test sides, what belongs together on one side", "ftjax.data.split:Split"
    ),
    "synthesize": StepVerb(
        "question-answer, instruction and preference examples from the sections of documents",
        "ftjax.recipes.data.models:Synthesize",
    ),
    "score": StepVerb(
        "perplexity, IFD and length of answers, and a judge's ratings, into meta.scores",
        "ftjax.recipes.data.models:Score",
    ),
    "select": StepVerb("keep k rows, by score and diversity, length or chance", "ftjax.data.select:Select"),
}
"""What chains: each is a verb over files and a key in a recipe of `prepare`."""

VERBS = {
    "logs": Verb("examples from production logs: sampled, masked, by what users said of them", "logs"),
    "card": Verb("describe a set: counts, licences, sources, pictures, a page to browse it in", "card"),
    "inspect": Verb("what a file holds: format, counts, tokens, languages, and what is wrong", "inspect"),
    "render": Verb("show examples as the model sees them, the trained tokens coloured", "render"),
    "extract": Verb("documents, sites and folders to clean sections", "extract"),
    "prepare": Verb("a recipe of sources and steps to a finished set, resumed where it stopped", "prepare"),
}


def main(argv: list[str]) -> int:
    """Runs `ftjax data VERB …`; raises UserError."""
    verbs = {**VERBS, **STEPS}
    if not argv or argv[0] in ("-h", "--help", "help"):
        width = max(map(len, verbs))
        lines = "\n".join(f"  {name:<{width}}  {verb.about}" for name, verb in sorted(verbs.items()))
        print(f"Prepare and look at training data.\n\nUsage: ftjax data VERB …\n\n{lines}\n\n{_MORE}")
        return 0
    name, rest = argv[0], argv[1:]
    if name not in verbs:
        near = difflib.get_close_matches(name, verbs, 1, 0.5)
        hint = f"; did you mean ftjax data {near[0]}?" if near else ""
        raise UserError(f"there is no verb `data {name}`{hint} (verbs: {', '.join(sorted(verbs))})")
    if name in STEPS:
        from ftjax.recipes.data import stage

        return stage.main(name, rest)
    return importlib.import_module(f"ftjax.recipes.data.{VERBS[name].module}").main(rest) or 0


_MORE = """\
First steps:
  ftjax data inspect FILE                        what it holds, and what is wrong with it
  ftjax data prepare RECIPE.yaml                 clean, deduplicate, split and describe it

Exit codes: 0 done, 3 done and some rows were in error (prepare leaves them out and ends with 0), others as
of ftjax.
`ftjax data VERB --help` says more."""


def load_step(name: str) -> type:
    """The Step class of a key of STEPS."""
    module, _, cls = STEPS[name].step.partition(":")
    return getattr(importlib.import_module(module), cls)
