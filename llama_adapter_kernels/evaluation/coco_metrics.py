"""BLEU, ROUGE-L and CIDEr-D as the COCO caption scorer defines them, on given tokens, in plain Python.

They equal pycocoevalcap's numbers on the same tokens. That scorer's tokenizer and METEOR are Java programs; `simple_tokens`
stands in for the tokenizer where there is no Java, and then scores differ slightly from published ones.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence

Tokens = Sequence[str]
_TINY, _SMALL = 1e-15, 1e-9  # the reference scorer's guards against division by zero
_PUNCTUATION = re.compile(r"[^\w\s'-]|(?<!\w)['-]|['-](?!\w)")


def simple_tokens(text: str) -> list[str]:
    """Lower-cased words without punctuation: close to the Penn Treebank tokens of the COCO scorer."""
    words = _PUNCTUATION.sub(" ", text.lower())
    return re.sub(r"(\w)('s|'re|'ve|'ll|'d|'m|n't)\b", r"\1 \2", words).split()


def ngrams(tokens: Tokens, longest: int) -> list[Counter[tuple[str, ...]]]:
    """Counts of the n-grams of each length from 1 to `longest`."""
    return [
        Counter(tuple(tokens[start : start + n]) for start in range(len(tokens) - n + 1)) for n in range(1, longest + 1)
    ]


def corpus_bleu(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]]) -> list[float]:
    """BLEU-1 to BLEU-4 of a corpus, brevity against the closest reference length."""
    matches, totals = [0] * 4, [0] * 4
    length = reference_length = 0
    for candidate, own in zip(candidates, references, strict=True):
        length += len(candidate)
        reference_length += min((abs(len(r) - len(candidate)), len(r)) for r in own)[1]
        counted = [ngrams(reference, 4) for reference in own]
        for n, grams in enumerate(ngrams(candidate, 4)):
            totals[n] += max(len(candidate) - n, 0)
            matches[n] += sum(min(count, max(c[n][gram] for c in counted)) for gram, count in grams.items())
    ratio = (length + _TINY) / (reference_length + _SMALL)
    brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
    scores, product = [], 1.0
    for n in range(4):
        product *= (matches[n] + _TINY) / (totals[n] + _SMALL)
        scores.append(brevity * product ** (1 / (n + 1)))
    return scores


def rouge_l(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], beta: float = 1.2) -> float:
    """Mean ROUGE-L of a corpus: the best recall and the best precision over the references, weighted by beta."""
    total = 0.0
    for candidate, own in zip(candidates, references, strict=True):
        lengths = [_common_length(reference, candidate) for reference in own]
        precision = max(common / len(candidate) for common in lengths) if candidate else 0.0
        recall = max(common / len(r) if r else 0.0 for common, r in zip(lengths, own, strict=True))
        if precision and recall:
            total += (1 + beta**2) * precision * recall / (recall + beta**2 * precision)
    return total / len(candidates)


def cider_d(candidates: Sequence[Tokens], references: Sequence[Sequence[Tokens]], sigma: float = 6.0) -> list[float]:
    """CIDEr-D of every candidate (Vedantam et al., 2015): n up to 4, inverse document frequencies of the references.

    Returns:
        One score per candidate, times 10 as published; the corpus score is their mean.
    """
    documents: Counter[tuple[str, ...]] = Counter()
    counted = [[ngrams(reference, 4) for reference in own] for own in references]
    for own in counted:
        documents.update({gram for reference in own for counts in reference for gram in counts})
    size = math.log(len(references))

    def weigh(counts: list[Counter[tuple[str, ...]]]) -> tuple[list[dict[tuple[str, ...], float]], list[float], int]:
        vectors = [
            {gram: count * (size - math.log(max(1.0, documents[gram]))) for gram, count in part.items()}
            for part in counts
        ]
        norms = [math.sqrt(sum(value * value for value in vector.values())) for vector in vectors]
        return vectors, norms, sum(counts[1].values())  # the scorer measures length in bigrams

    scores = []
    for candidate, own in zip(candidates, counted, strict=True):
        vectors, norms, length = weigh(ngrams(candidate, 4))
        total = 0.0
        for reference in own:
            their_vectors, their_norms, their_length = weigh(reference)
            penalty = math.exp(-((length - their_length) ** 2) / (2 * sigma**2))
            for n in range(4):
                theirs = their_vectors[n]
                product = sum(min(v, theirs.get(gram, 0.0)) * theirs.get(gram, 0.0) for gram, v in vectors[n].items())
                if norms[n] and their_norms[n]:
                    product /= norms[n] * their_norms[n]
                total += product * penalty
        scores.append(10.0 * total / (4 * len(own)))
    return scores


def _common_length(first: Tokens, second: Tokens) -> int:
    """The length of the longest common subsequence."""
    row = [0] * (len(second) + 1)
    for token in first:
        diagonal = 0
        for index, other in enumerate(second, 1):
            diagonal, row[index] = row[index], diagonal + 1 if token == other else max(row[index], row[index - 1])
    return row[-1]
