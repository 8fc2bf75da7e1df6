"""Scores of generated text against references."""

from __future__ import annotations

import importlib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
References = Sequence[Sequence[str]]  # for each prediction the answers that are right


def normalize(text: str) -> str:
    """As SQuAD compares answers: lower case, without punctuation, articles and double spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(predictions: Sequence[str], references: References) -> dict[str, float]:
    """The share of predictions that are a reference, after `normalize`."""
    hits = [
        normalize(prediction) in {normalize(reference) for reference in answers}
        for prediction, answers in zip(predictions, references, strict=True)
    ]
    return {"exact_match": sum(hits) / len(hits)}


def f1(predictions: Sequence[str], references: References) -> dict[str, float]:
    """SQuAD's F1: overlap of words with the best reference, averaged over predictions."""
    best = [
        max(word_f1(prediction, reference) for reference in answers)
        for prediction, answers in zip(predictions, references, strict=True)
    ]
    return {"f1": sum(best) / len(best)}


def word_f1(prediction: str, reference: str) -> float:
    """The harmonic mean of precision and recall of the normalised words."""
    ours, theirs = normalize(prediction).split(), normalize(reference).split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = sum((Counter(ours) & Counter(theirs)).values())
    return 2 * common / (len(ours) + len(theirs))


def entities(text: str) -> Counter[tuple[str, str]]:
    """The (name, type) pairs of a text as the task `entities` writes them.

    >>> entities("person: Ada; location: London")
    Counter({('ada', 'person'): 1, ('london', 'location'): 1})
    """
    found: Counter[tuple[str, str]] = Counter()
    for part in re.split(r"[;\n]", text):
        kind, colon, name = part.partition(":")
        if colon and kind.strip() and name.strip():
            found[" ".join(name.lower().split()), kind.strip().lower()] += 1
    return found


def entity_f1(predictions: Sequence[str], references: References) -> dict[str, float]:
    """Precision, recall and F1 of whole entities over all texts (micro average, as conlleval)."""
    right = given = wanted = 0
    for prediction, answers in zip(predictions, references, strict=True):
        ours, theirs = entities(prediction), entities(answers[0])
        right += sum((ours & theirs).values())
        given += sum(ours.values())
        wanted += sum(theirs.values())
    return {
        "entity_precision": right / given if given else 0.0,
        "entity_recall": right / wanted if wanted else 0.0,
        "entity_f1": 2 * right / (given + wanted) if given + wanted else 1.0,
    }


def bleu(predictions: Sequence[str], references: References) -> dict[str, float]:
    """sacrebleu's BLEU, 0 to 100 (extra `metrics`)."""
    import sacrebleu

    most = max(map(len, references))
    columns: list[Any] = [
        [row[i] if i < len(row) else None for row in references] for i in range(most)
    ]
    return {"bleu": float(sacrebleu.corpus_bleu(list(predictions), columns).score)}


def rouge(predictions: Sequence[str], references: References) -> dict[str, float]:
    """F-measures of ROUGE-1, ROUGE-2 and ROUGE-L, the best reference each (extra `metrics`)."""
    from rouge_score import rouge_scorer

    names = ("rouge1", "rouge2", "rougeL")
    scorer = rouge_scorer.RougeScorer(names, use_stemmer=True)
    sums = dict.fromkeys(names, 0.0)
    for prediction, answers in zip(predictions, references, strict=True):
        scores = [scorer.score(reference, prediction) for reference in answers]
        for name in names:
            sums[name] += max(each[name].fmeasure for each in scores)
    return {name: total / len(predictions) for name, total in sums.items()}


_PACKAGES = {"bleu": "sacrebleu", "rouge": "rouge_score"}


def require(name: str) -> None:
    """Raises ModuleNotFoundError where the package of a metric is missing: before the work."""
    if name in _PACKAGES:
        importlib.import_module(_PACKAGES[name])


METRICS: dict[str, Callable[[Sequence[str], References], dict[str, float]]] = {
    "exact_match": exact_match,
    "f1": f1,
    "entity_f1": entity_f1,
    "bleu": bleu,
    "rouge": rouge,
}
