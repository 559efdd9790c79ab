"""VQA soft accuracy (Antol et al., 2015): an answer counts as far as the ten people who were asked agree with it."""

import re
from collections.abc import Sequence
from pathlib import Path

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.evaluation.files import field_of, media_file, only_file, read_json
from llama_adapter_kernels.evaluation.task import Item, Options, Published, Score
from llama_adapter_kernels.training.data import Row

_NUMBERS = {"none": "0"} | {
    word: str(number)
    for number, word in enumerate(
        ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
    )
}
_ARTICLES = {"a", "an", "the"}
_WORDS = """
    aren't can't couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how's i'd i'm i've isn't it'd it'll let's
    ma'am mightn't mustn't needn't shan't shouldn't somebody's someone's something's that's there's they'd they're they've
    wasn't weren't what's where's who'd who's why's won't wouldn't y'all you'd you're you've
"""
_CONTRACTIONS = {word.replace("'", ""): word for word in _WORDS.split()}


class VQA:
    """`--data` is a folder with one *questions*.json and one *annotations*.json; images by --media."""

    name = "vqa"
    max_new_tokens = 16
    published: tuple[Published, ...] = ()

    def read(self, data: Path, options: Options) -> list[Item]:
        question_file = only_file(data, [f"*{options.split}*questions*.json", "*questions*.json"])
        annotation_file = only_file(data, [f"*{options.split}*annotations*.json", "*annotations*.json"])
        answers: dict[int, tuple[str, ...]] = {}
        for index, entry in enumerate(field_of(read_json(annotation_file), "annotations", list, str(annotation_file))):
            where = f"{annotation_file}, annotation {index}"
            given = field_of(entry, "answers", list, where)
            answers[field_of(entry, "question_id", int, where)] = tuple(
                field_of(answer, "answer", str, where) for answer in given
            )
        items = []
        for index, entry in enumerate(field_of(read_json(question_file), "questions", list, str(question_file))):
            where = f"{question_file}, question {index}"
            number = field_of(entry, "question_id", int, where)
            if number not in answers:
                raise UserError(
                    f"{where}: question {number} has no answers in {annotation_file.name}; expected one split"
                )
            question = field_of(entry, "question", str, where)
            image = None if options.text_only else _image(entry, data, options, where)
            items.append(Item(str(number), Row(question), answers[number], {}, image))
        return items

    def score(self, items: Sequence[Item], predictions: Sequence[str], options: Options) -> list[Score]:
        values = [soft_accuracy(p, item.references) for item, p in zip(items, predictions, strict=True)]
        return [Score("accuracy", 100.0 * sum(values) / len(values), len(values))]


def soft_accuracy(answer: str, people: Sequence[str]) -> float:
    """Mean over all groups of people but one of min(1, how many of the group gave this answer / 3)."""
    given, theirs = normalized(answer), [normalized(person) for person in people]
    agreeing = sum(person == given for person in theirs)
    if len(theirs) < 2:
        return float(agreeing > 0)
    # Leaving out one who agrees leaves agreeing - 1, leaving out anybody else leaves all.
    without, others = min(1.0, (agreeing - 1) / 3), min(1.0, agreeing / 3)
    return (agreeing * without + (len(theirs) - agreeing) * others) / len(theirs)


def normalized(answer: str) -> str:
    """Lower case, digits for number words, no articles, no punctuation, apostrophes of contractions restored."""
    text = answer.replace("\n", " ").replace("\t", " ").strip().lower()
    text = re.sub(r"(?<=\d),(?=\d)", "", text)  # 1,000
    text = re.sub(r"(?<!\d)\.|\.(?!\d)", "", text)  # a full stop, but not 1.5
    text = re.sub(r"[;/\[\]\"{}()=+\\_\-><@`,?!]", " ", text)
    words = [_NUMBERS.get(word, word) for word in text.split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _image(entry: dict[str, object], data: Path, options: Options, where: str) -> Path:
    number = field_of(entry, "image_id", (int, str), where)
    folder = options.media or data
    if isinstance(number, str):
        return media_file(folder / number, where)
    found = sorted(folder.glob(f"*_{number:012d}.*")) or sorted(folder.glob(f"{number}.*"))
    if not found:
        raise UserError(f"{where}: no image {number} in {folder}")
    return found[0]
