"""MusicQA (MU-LLaMA): open answers about music, scored by BLEU, METEOR, ROUGE-L and BERTScore.

The published script has quirks that make its numbers incomparable with anybody else's: BLEU is given strings, not tokens,
so it counts characters; ROUGE-L is recall. Mode "paper" reproduces them, to compare with the published table. Mode
"correct" gives what the names stand for: sacrebleu's corpus BLEU and the F-measure of ROUGE-L.
"""

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.evaluation.files import field_of, media_file, read_json
from llama_adapter_kernels.evaluation.task import Item, Options, Published, Score
from llama_adapter_kernels.training.data import Row

_PUBLISHED = {
    "MU-LLaMA [published]": (0.306, 0.385, 0.466, 0.901),
    "ImageBind-LLM, called LLaMA-Adapter [published]": (0.273, 0.334, 0.413, 0.895),
    "LTU [published]": (0.242, 0.274, 0.326, 0.887),
}
_NAMES = ("BLEU", "METEOR", "ROUGE-L", "BERTScore")


class MusicQA:
    """`--data` is a JSON array of {audio_name, conversation: [{value: question}, {value: answer}]}."""

    name = "music_qa"
    max_new_tokens = 128
    published = tuple(Published(system, dict(zip(_NAMES, row, strict=True))) for system, row in _PUBLISHED.items())

    def read(self, data: Path, options: Options) -> list[Item]:
        rows = read_json(data)
        if not isinstance(rows, list) or not rows:
            raise UserError(f"{data}: expected an array of questions, got {type(rows).__name__}")
        items = []
        for index, row in enumerate(rows):
            where = f"{data}, row {index + 1}"
            turns = field_of(row, "conversation", list, where)
            if len(turns) != 2:
                raise UserError(
                    f"{where}: expected a question and an answer in its conversation, got {len(turns)} turns"
                )
            question, answer = (field_of(turn, "value", str, where) for turn in turns)
            audio = None
            if not options.text_only:
                audio = media_file((options.media or data.parent) / field_of(row, "audio_name", str, where), where)
            items.append(Item(str(index), Row(question, "", answer), (answer,), {}, None, audio))
        return items

    def score(self, items: Sequence[Item], predictions: Sequence[str], options: Options) -> list[Score]:
        pairs = [(item.references[0], prediction) for item, prediction in zip(items, predictions, strict=True)]
        paper = options.mode == "paper"
        metrics: dict[str, Callable[[Sequence[tuple[str, str]]], float]] = {
            "BLEU": character_bleu if paper else corpus_bleu,
            "METEOR": meteor,
            "ROUGE-L": rouge_recall if paper else rouge_f_measure,
            "BERTScore": lambda pairs: bert_score(pairs, options.bertscore_model, recall=paper),
        }
        return [_attempt(name, metric, pairs) for name, metric in metrics.items()]


def character_bleu(pairs: Sequence[tuple[str, str]]) -> float:
    """Mean sentence BLEU-4 of nltk over characters: what the published script computes by passing strings."""
    from nltk.translate.bleu_score import sentence_bleu

    with warnings.catch_warnings():  # an answer without any common 4-gram of characters
        warnings.simplefilter("ignore", UserWarning)
        return float(sum(sentence_bleu([reference], answer) for reference, answer in pairs) / len(pairs))


def corpus_bleu(pairs: Sequence[tuple[str, str]]) -> float:
    """sacrebleu's corpus BLEU, from 0 to 1."""
    import sacrebleu

    references, answers = zip(*pairs, strict=True)
    return float(sacrebleu.corpus_bleu(list(answers), [list(references)]).score) / 100.0


def rouge_recall(pairs: Sequence[tuple[str, str]]) -> float:
    """Mean ROUGE-L recall with stemming: long answers are never penalised."""
    return _rouge(pairs, "recall")


def rouge_f_measure(pairs: Sequence[tuple[str, str]]) -> float:
    """Mean ROUGE-L F-measure with stemming."""
    return _rouge(pairs, "fmeasure")


def meteor(pairs: Sequence[tuple[str, str]]) -> float:
    """Mean METEOR of nltk on word-and-punctuation tokens.

    Raises:
        LookupError: nltk has no WordNet.
    """
    from nltk.corpus import wordnet
    from nltk.tokenize import wordpunct_tokenize
    from nltk.translate.meteor_score import single_meteor_score

    wordnet.ensure_loaded()
    total = sum(single_meteor_score(wordpunct_tokenize(r), wordpunct_tokenize(a)) for r, a in pairs)
    return float(total / len(pairs))


def bert_score(pairs: Sequence[tuple[str, str]], model: str, *, recall: bool) -> float:
    """Mean BERTScore: recall (published script) or F1, from the embeddings of `model`. An empty answer scores 0.

    Raises:
        OSError: there is no such model here, and no hub to get it from.
    """
    from bert_score import BERTScorer
    from bert_score.utils import model2layers
    from transformers import AutoConfig

    answered = [(reference, answer) for reference, answer in pairs if answer.strip()]
    if not answered:
        return 0.0
    layers = model2layers.get(model)
    if layers is None:  # as deep into an unknown model as layer 17 of 24 is into roberta-large
        layers = max(1, AutoConfig.from_pretrained(model).num_hidden_layers * 17 // 24)
    references, answers = zip(*answered, strict=True)
    scorer = BERTScorer(model_type=model, num_layers=layers, lang="en")
    _, recalls, f_measures = scorer.score(list(answers), list(references))
    return float((recalls if recall else f_measures).sum()) / len(pairs)


def _rouge(pairs: Sequence[tuple[str, str]], what: str) -> float:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer(["rougeL"], use_stemmer=True)
    return float(sum(getattr(scorer.score(r, a)["rougeL"], what) for r, a in pairs) / len(pairs))


def _attempt(
    name: str, metric: Callable[[Sequence[tuple[str, str]]], float], pairs: Sequence[tuple[str, str]]
) -> Score:
    """A metric whose package or data is missing leaves a reason instead of a number; the others still count."""
    try:
        return Score(name, metric(pairs), len(pairs))
    except ModuleNotFoundError as error:
        note = f"{error.name} is not installed: pip install 'llama-adapter-kernels[evaluation]'"
    except LookupError:
        note = "nltk has no WordNet: python -m nltk.downloader wordnet"
    except OSError as error:
        note = str(error).partition("\n")[0]
    return Score(name, None, len(pairs), note)
