"""The comparisons of quality: every method trains what it says, results are kept, the report has them all."""

import io
import json
import math
import tarfile
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BertConfig, BertModel, DynamicCache, LlamaConfig, LlamaForCausalLM, ViTConfig, ViTModel

pytest.importorskip("peft")
pytest.importorskip("matplotlib")
from benchmarks.quality import encoder_methods, encoders, joint, language, language_methods, report, runs
from benchmarks.quality.runs import Run
from tests.support.tiny_model import save_tiny_model


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A tiny model and rows for it."""
    folder = tmp_path_factory.mktemp("quality")
    model = save_tiny_model(folder / "model") if (folder / "model").mkdir() is None else folder
    rows = [{"instruction": f"Say {i}", "output": f"It is {i}."} for i in range(30)]
    (folder / "rows.json").write_text(json.dumps(rows))
    return str(model), folder / "rows.json"


def language_task(material: tuple[str, Path], **options: Any) -> language.LanguageTask:
    model, data = material
    sizes = {"steps": 2, "batch": 2, "validation": 3, "test": 3, "rows_at_once": 2, "new_tokens": 2} | options
    return language.LanguageTask(model, data, "cpu", **sizes)


# ---- methods ----


def test_prompts_without_a_gate_are_keys_in_the_same_softmax() -> None:
    """As if keys and values of the prompts had been cached before the words, which keep their positions."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).double().eval()
    tokens = torch.randint(0, 60, (2, 7))
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    prompts = [torch.randn(3, 32, dtype=torch.float64) for _ in model.model.layers]
    cache = DynamicCache()
    for number, (layer, prompt) in enumerate(zip(model.model.layers, prompts, strict=True)):
        at = layer.self_attn
        key, value = (p(prompt).view(1, 3, 2, 8).transpose(1, 2).expand(2, -1, -1, -1) for p in (at.k_proj, at.v_proj))
        cache.update(key, value, number)
    seen = torch.cat([torch.ones(2, 3, dtype=torch.long), mask], 1)
    expected = model(tokens, attention_mask=seen, position_ids=torch.arange(7)[None], past_key_values=cache).logits
    base = model(tokens, attention_mask=mask).logits

    prefixes = {
        layer.self_attn: joint.ProjectedPrompt(3, layer.self_attn, 32, 8).double() for layer in model.model.layers
    }
    for prefix, prompt in zip(prefixes.values(), prompts, strict=True):
        prefix.prompt.data.copy_(prompt)
    joint.attach(model, prefixes)
    found = model(tokens, attention_mask=mask, use_cache=False).logits
    live = mask.bool()
    assert (found - expected)[live].abs().max() < 1e-12
    assert (found - base)[live].abs().max() > 1e-3


@pytest.mark.parametrize("method", language_methods.METHODS)
def test_every_trained_parameter_of_a_language_model_gets_a_gradient(
    material: tuple[str, Path], method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And what is said to be frozen gets none. Gates at 0 let nothing through to the prompts: the second step does."""
    task = language_task(material)
    base, _, _, examples = task._material()
    before = {name: value.clone() for name, value in base.state_dict().items()}
    changed: dict[str, bool] = {}
    real = language_methods.METHODS[method].prepare

    def watched(model: Any, run: Run) -> Any:
        prepared = real(model, run)
        start = {name: p.detach().clone() for name, p in prepared.named_parameters() if p.requires_grad}

        def compare() -> None:
            changed.update(
                {name: not torch.equal(p, start[name]) for name, p in prepared.named_parameters() if name in start}
            )

        prepared.compare_for_test = compare
        return prepared

    monkeypatch.setitem(
        language.METHODS,
        method,
        language_methods.Method("", (0.01,), watched, language_methods.METHODS[method].prompts),
    )
    monkeypatch.setattr(task, "_answers", lambda *_: [])
    held_out = task._held_out

    def last(model: Any, *rest: Any) -> float:
        model.compare_for_test()
        return held_out(model, *rest)

    monkeypatch.setattr(task, "_held_out", last)
    form = task._form(method)
    result = task.carry_out(Run("language", method, 0.01, 1, **form), math.inf)
    assert changed and all(changed.values()), [name for name, moved in changed.items() if not moved]
    assert math.isfinite(result["test"])
    assert result["tokens"] == sum(len(example) for example in examples["training"][:4])
    assert all(torch.equal(value, before[name]) for name, value in base.state_dict().items())


@pytest.mark.parametrize("method", encoder_methods.METHODS)
@pytest.mark.parametrize("kind", ["bert", "vit"])
def test_every_trained_parameter_of_an_encoder_gets_a_gradient(method: str, kind: str) -> None:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    if kind == "bert":
        config = BertConfig(vocab_size=40, attention_probs_dropout_prob=0.0, hidden_dropout_prob=0.0, **shape)
        encoder = BertModel(config, add_pooling_layer=False)
        mask = (torch.arange(9) < torch.randint(4, 10, (8, 1))).long()
        inputs = {"input_ids": torch.randint(0, 40, (8, 9)), "attention_mask": mask}
    else:
        encoder = ViTModel(ViTConfig(image_size=8, patch_size=4, num_channels=1, **shape), add_pooling_layer=False)
        inputs = {"pixel_values": torch.randn(8, 1, 8, 8)}
    prepared = encoder_methods.METHODS[method].prepare(encoder, 3, 2)
    model = encoders.Classifier(prepared, 32, 2, "cpu")
    unused = "token_type_embeddings" if method == "full" else " "  # one of the two kinds of text is never given
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    losses = encoders.fit(model, inputs, torch.arange(8) % 2, 0.01, 6, 4, 0, math.inf)
    moved = {name: not torch.equal(p, start[name]) for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        if unused not in name and "position_embeddings" not in name:
            assert moved[name] == parameter.requires_grad, name
    assert len(losses) == 6 and all(map(math.isfinite, losses))


# ---- runs ----


class Counted:
    """A task that measures nothing, and remembers what it was asked for."""

    def __init__(self) -> None:
        self.done: list[Run] = []

    def plan(self, finished: Any) -> Any:
        grid = runs.grid("count", "a", (0.1, 0.2, 0.4))
        yield from ((0, run) for run in grid)
        rate = runs.best_rate(grid, finished)
        if rate is not None:
            yield 1, Run("count", "a", rate, 1)

    def carry_out(self, run: Run, deadline: float) -> Any:
        self.done.append(run)
        if run.rate == 0.4:
            raise ValueError("too fast\nfor this")
        return {"validation": abs(run.rate - 0.2), "test": 1.0, "parameters": 1}

    def about(self) -> dict[str, Any]:
        return {"steps": 1}


def test_seeds_follow_the_best_rate_and_nothing_is_run_twice(tmp_path: Path) -> None:
    output, task = tmp_path / "out.json", Counted()
    found = runs.compare({"count": task}, output, torch.device("cpu"), jobs=1, minutes=1)
    assert [(run.rate, run.seed) for run in task.done] == [(0.1, 0), (0.2, 0), (0.4, 0), (0.2, 1)]
    assert [result.get("error") for result in found] == [None, None, "ValueError: too fast", None]
    assert {runs.key(run) for run in json.loads(output.read_text())["runs"]} == {runs.key(run) for run in found}
    task.done.clear()
    runs.compare({"count": task}, output, torch.device("cpu"), jobs=1, minutes=1)
    assert [run.rate for run in task.done] == [0.4]  # what failed is tried again
    task.about = lambda: {"steps": 2}  # type: ignore[method-assign]
    with pytest.raises(SystemExit, match="expected results of the same settings"):
        runs.compare({"count": task}, output, torch.device("cpu"), jobs=1, minutes=1)


def test_a_run_that_is_out_of_time_or_diverges_counts_for_nothing(material: tuple[str, Path]) -> None:
    run = Run("language", "zero-gate", 0.01, 0, 3, 10)
    assert runs.carry_out(run, language_task(material), time.time() - 1) is None
    with pytest.raises(runs.OutOfTime):
        language_task(material).carry_out(run, time.time() - 1)
    task = Counted()
    task.carry_out = lambda *_: {"test": math.nan}  # type: ignore[method-assign]
    assert runs.carry_out(run, task, math.inf)["error"] == "diverged"
    failed = [{**Run("t", "m", rate).__dict__, "error": "diverged"} for rate in (0.1, 0.2)]
    assert runs.best_rate(runs.grid("t", "m", (0.1, 0.2)), failed) is None


# ---- data ----


def test_parts_share_no_row_and_do_not_depend_on_the_order_of_methods(material: tuple[str, Path]) -> None:
    rows = [language.Row(f"ask {i % 20}", "", f"{i}") for i in range(25)]
    parts = language.parts_of(rows, 4, 3)
    texts = [row.instruction for part in parts.values() for row in part]
    assert len(texts) == len(set(texts)) == 20
    assert language.parts_of(rows, 4, 3) == parts


def test_reviews_are_read_from_the_source_distribution(tmp_path: Path) -> None:
    lines = "1\t2.5\tA fine\tfilm.\n2\t-3.1\tDreadful.\n3\t0.2\tIt has a beginning.\nbroken\n"

    def archive(name: str, data: bytes) -> bytes:
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w:gz") as tar:
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
        return packed.getvalue()

    inner = archive(encoders.REVIEWS, lines.encode())
    (tmp_path / "sdist.tar.gz").write_bytes(archive("v-3/additional_resources/hutto_ICWSM_2014.tar.gz", inner))
    assert encoders.read_reviews(tmp_path / "sdist.tar.gz") == (["A fine\tfilm.", "Dreadful."], [1, 0])


# ---- report ----


def test_the_report_has_every_method_and_its_spread(
    material: tuple[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(language, "LENGTHS", (10, 30))
    language_part = language_task(material, methods=("zero-gate",))
    digits = encoders.EncoderTask(
        "digits", "cpu", training=8, validation=8, test=8, steps=2, batch=4, rank=2, methods=("head",)
    )
    digits._loaded["material"] = small_digits()
    output = tmp_path / "results.json"
    runs.compare({"language": language_part, "digits": digits}, output, torch.device("cpu"), jobs=1, minutes=2)
    (tmp_path / "README.md").write_text(f"# Top\n\n{report.BEGIN}\nold\n{report.END}\n\nBottom\n")
    report.write([output], tmp_path)
    page = (tmp_path / "README.md").read_text()
    assert page.startswith("# Top") and page.endswith("\n\nBottom\n") and "old" not in page
    for said in ("zero-init gates (this package) | 1,932 |", "head only |", "| before training |",
                 "| length (3 layers) |", "| 30 | ", " ± ", "wrong answers"):  # fmt: skip
        assert said in page, said
    for name in ("curves.svg", "encoders.svg"):
        assert (tmp_path / name).read_text().startswith("<?xml")
    report.write([output], tmp_path)
    assert (tmp_path / "README.md").read_text() == page


def small_digits() -> tuple[Any, dict[str, Any]]:
    torch.manual_seed(0)
    config = ViTConfig(
        image_size=8, patch_size=4, num_channels=1, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2,
    )  # fmt: skip
    part = {"pixel_values": torch.randn(8, 1, 8, 8)}, torch.arange(8) % 2
    return ViTModel(config, add_pooling_layer=False), dict.fromkeys(("training", "validation", "test"), part)


def test_answers_stay_text_in_markdown() -> None:
    assert report._line("a\n*b* <i> `c` $1 | # [d](e) \\") == r"a \*b\* \<i> \`c\` &#36;1 \| \# \[d](e) " + "\\\\"
    assert report._line(" ") == "(nothing)"
