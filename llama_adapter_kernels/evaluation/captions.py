"""COCO Caption: BLEU-1 to 4, METEOR, ROUGE-L and CIDEr-D, through the reference scorer where Java is found."""

import shutil
from collections.abc import Sequence
from importlib import util
from pathlib import Path
from typing import Any

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.evaluation.coco_metrics import cider_d, corpus_bleu, rouge_l, simple_tokens
from llama_adapter_kernels.evaluation.files import field_of, media_file, read_json
from llama_adapter_kernels.evaluation.task import Item, Options, Published, Score
from llama_adapter_kernels.training.data import Row

INSTRUCTION = "Generate caption of this image :"


class Captions:
    """`--data` is an annotation file: COCO's own (images, annotations) or Karpathy's splits (dataset_coco.json)."""

    name = "captions"
    max_new_tokens = 40
    published = (Published("LLaMA-Adapter [paper]", {"BLEU-4": 36.2, "CIDEr": 122.2}),)

    def read(self, data: Path, options: Options) -> list[Item]:
        content = read_json(data)
        folder = options.media or data.parent
        pictures = field_of(content, "images", list, str(data))
        found = _karpathy(pictures, options.split, data) if "annotations" not in content else _coco(content, data)
        items = []
        for number, name, captions in found:
            where = f"{data}, image {number}"
            if not captions:
                raise UserError(f"{where}: no caption in this file; expected annotations of the same split")
            image = None if options.text_only else media_file(folder / name, where)
            items.append(Item(number, Row(INSTRUCTION), tuple(captions), {}, image))
        return items

    def score(self, items: Sequence[Item], predictions: Sequence[str], options: Options) -> list[Score]:
        reason = reference_scorer_missing()
        values = _plain(items, predictions) if reason else _reference_scorer(items, predictions)
        note = f"plain-Python tokens ({reason})" if reason else ""
        scores = [Score(name, 100.0 * value, len(items), note) for name, value in values.items()]
        if "METEOR" not in values:
            scores.append(Score("METEOR", None, len(items), str(reason)))
        return scores


def reference_scorer_missing() -> str | None:
    """Why the reference scorer cannot run here; None when it can."""
    if util.find_spec("pycocoevalcap") is None:
        return "pycocoevalcap is not installed: pip install 'llama-adapter-kernels[evaluation]'"
    return None if shutil.which("java") else "no Java on the PATH"


def coco_results(items: Sequence[Item], predictions: Sequence[str]) -> list[dict[str, Any]]:
    """Predictions in the format of COCO's evaluation server."""
    return [
        {"image_id": int(item.id) if item.id.isdecimal() else item.id, "caption": prediction}
        for item, prediction in zip(items, predictions, strict=True)
    ]


def _coco(content: Any, data: Path) -> list[tuple[str, str, list[str]]]:
    captions: dict[Any, list[str]] = {}
    for index, annotation in enumerate(content["annotations"]):
        where = f"{data}, annotation {index}"
        captions.setdefault(field_of(annotation, "image_id", (int, str), where), []).append(
            field_of(annotation, "caption", str, where)
        )
    found = []
    for index, image in enumerate(content["images"]):
        where = f"{data}, image {index}"
        number = field_of(image, "id", (int, str), where)
        found.append((str(number), field_of(image, "file_name", str, where), captions.get(number, [])))
    return found


def _karpathy(pictures: list[Any], split: str, data: Path) -> list[tuple[str, str, list[str]]]:
    found, splits = [], set()
    for index, picture in enumerate(pictures):
        where = f"{data}, image {index}"
        splits.add(own := field_of(picture, "split", str, where))
        if own != split and not (split == "train" and own == "restval"):
            continue
        sentences = field_of(picture, "sentences", list, where)
        name = field_of(picture, "filename", str, where)
        number = picture.get("cocoid", picture.get("imgid", index))
        captions = [field_of(sentence, "raw", str, where) for sentence in sentences]
        found.append((str(number), str(Path(picture.get("filepath", "")) / name), captions))
    if not found:
        raise UserError(f"{data}: expected a split {split}, it has {', '.join(sorted(splits))}")
    return found


def _plain(items: Sequence[Item], predictions: Sequence[str]) -> dict[str, float]:
    candidates = [simple_tokens(prediction) for prediction in predictions]
    references = [[simple_tokens(caption) for caption in item.references] for item in items]
    bleu = corpus_bleu(candidates, references)
    cider = cider_d(candidates, references)
    values = {f"BLEU-{n + 1}": value for n, value in enumerate(bleu)}
    return values | {"ROUGE-L": rouge_l(candidates, references), "CIDEr": sum(cider) / len(cider)}


def _reference_scorer(items: Sequence[Item], predictions: Sequence[str]) -> dict[str, float]:
    from pycocoevalcap.meteor.meteor import Meteor
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenizer = PTBTokenizer()
    references = tokenizer.tokenize({i: [{"caption": c} for c in item.references] for i, item in enumerate(items)})
    candidates = tokenizer.tokenize({i: [{"caption": p}] for i, p in enumerate(predictions)})
    # After the Java tokenizer only METEOR needs Java: the other scores are the same in plain Python, and tested to be.
    ours = [candidates[i][0].split() for i in range(len(items))]
    theirs = [[caption.split() for caption in references[i]] for i in range(len(items))]
    bleu, cider = corpus_bleu(ours, theirs), cider_d(ours, theirs)
    values = {f"BLEU-{n + 1}": value for n, value in enumerate(bleu)}
    values["METEOR"] = float(Meteor().compute_score(references, candidates)[0])
    return values | {"ROUGE-L": rouge_l(ours, theirs), "CIDEr": sum(cider) / len(cider)}
