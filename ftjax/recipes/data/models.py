"""The steps that may ask a model of this machine, which the library below cannot open by a run's folder."""

from ftjax.data import score, synthesize
from ftjax.data.writer import Speaker


def _load(name: str) -> Speaker:
    from ftjax.recipes import chat  # brings jax

    return chat.load(name)


class Synthesize(synthesize.Synthesize):
    def local(self, name: str) -> Speaker:
        return _load(name)


class Score(score.Score):
    def local(self, name: str) -> Speaker:
        return _load(name)
