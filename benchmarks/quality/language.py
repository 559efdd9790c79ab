"""A pre-trained language model learns to answer instructions in seven ways: the same examples in the same order for each."""

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.quality.language_methods import METHODS, optimizer_of, trained
from benchmarks.quality.runs import SEEDS, Result, Run, best_rate, check_time, grid
from llama_adapter_kernels.models import load_model_and_tokenizer
from llama_adapter_kernels.training.data import Row, read_rows
from llama_adapter_kernels.training.tokens import IGNORED_LABEL, Example, prompt_tokens, tokenize

MAIN = (30, 10)  # layers and length of prompts; fewer layers where the model has fewer
LAYERS, LENGTHS = (8, 16, 24, 30), (1, 10, 30)
CURVE_POINTS = 2  # of the validation loss while training
PAD_TO = 64  # lengths of padded batches are multiples of this: few different shapes
ANSWERED_BY = ("zero-gate", "lora-r8", "full")


@dataclass
class LanguageTask:
    """Fine-tuning on `steps` times `batch` rows of instruction data; loss in nats per response token.

    Args:
        rows_at_once: of a forward and backward pass; a step adds them up.
        autocast: weights stay float32, products are computed in bfloat16.
    """

    model: str
    data: Path
    device: str
    steps: int = 80
    batch: int = 16
    max_length: int = 256
    validation: int = 64
    test: int = 256
    rows_at_once: int = 16
    new_tokens: int = 48
    autocast: bool = False
    methods: tuple[str, ...] = tuple(METHODS)
    _loaded: dict[str, Any] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_loaded": {}}

    def about(self) -> dict[str, Any]:
        names = ("steps", "batch", "max_length", "validation", "test")
        rates = {name: METHODS[METHODS[name].rate_of or name].rates for name in self.methods}
        return {name: getattr(self, name) for name in names} | {
            "model": Path(self.model).name, "data": self.data.name,
            "dtype": "bfloat16 with float32 weights (autocast)" if self.autocast else "float32",
            "rates": {name: list(values) for name, values in rates.items()},
            "rate_of": {name: METHODS[name].rate_of for name in self.methods if METHODS[name].rate_of in self.methods},
            "titles": {name: METHODS[name].title for name in self.methods},
        }  # fmt: skip

    # ---- what is run ----

    def plan(self, finished: Sequence[Result]) -> Iterator[tuple[int, Run]]:
        searched = [name for name in self.methods if METHODS[name].rate_of not in self.methods]
        grids = {name: grid("language", name, METHODS[name].rates, **self._form(name)) for name in searched}
        for runs in grids.values():
            yield from ((0, run) for run in runs)
        for name in self.methods:
            rate = best_rate(grids[name if name in searched else METHODS[name].rate_of], finished)
            if rate is not None:
                yield from ((1, Run("language", name, rate, seed, **self._form(name))) for seed in SEEDS)
        rate = best_rate(grids["zero-gate"], finished) if "zero-gate" in grids else None
        if rate is not None:
            most = self._form("zero-gate")["layers"]
            forms = [(layers, MAIN[1]) for layers in LAYERS if layers < most]
            forms += [(most, length) for length in LENGTHS if length != MAIN[1]]
            for rank, seed in enumerate(SEEDS):
                for layers, length in forms:
                    yield 10 + rank, Run("language", "zero-gate", rate, seed, layers, length)

    def _form(self, method: str) -> dict[str, int]:
        if not METHODS[method].prompts:
            return {"layers": 0, "length": 0}
        if "layers" not in self._loaded:
            from llama_adapter_kernels.models import load_config

            self._loaded["layers"] = load_config(self.model).num_hidden_layers
        return {"layers": min(MAIN[0], self._loaded["layers"]), "length": MAIN[1]}

    # ---- one run ----

    def carry_out(self, run: Run, deadline: float) -> Result:
        base, tokenizer, rows, examples = self._material()
        torch.manual_seed(run.seed)
        network = copy.deepcopy(base)
        head = network.get_output_embeddings()
        model = METHODS[run.method].prepare(network, run)
        answers: dict[str, Any] = {}
        answering = run.seed == SEEDS[1] and run.method in ANSWERED_BY and run.length in (0, MAIN[1])
        if answering and run.method == "zero-gate":
            answers["before"] = self._answers(model, tokenizer, rows)
            test_before = self._held_out(model, head, examples["test"], deadline)
        measured, tokens = self._train(model, head, examples, run, deadline)
        if answering:
            answers["after"] = self._answers(model, tokenizer, rows)
        test = self._held_out(model, head, examples["test"], deadline)
        shown = {"answers": answers, "prompts": [row.instruction for row in rows]} if answering else {}
        if "before" in answers:
            shown["test_before"] = test_before
        return {
            "parameters": sum(parameter.numel() for parameter in trained(model)),
            "tokens": tokens,
            "validation": measured["validation_curve"][-1][1],
            "test": test,
            **measured,
            **shown,
        }

    def _train(
        self, model: nn.Module, head: nn.Module, examples: dict[str, list[Example]], run: Run, deadline: float
    ) -> tuple[dict[str, Any], int]:
        """The loss of every step, the validation loss at some; and the number of tokens seen, without padding."""
        optimizer, schedule = optimizer_of(model, run.rate, self.steps)
        chosen = examples["training"][: self.steps * self.batch]
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(run.seed)).tolist()
        curve = [(0, self._held_out(model, head, examples["validation"], deadline))]
        losses, tokens = [], 0
        every = max(1, self.steps // CURVE_POINTS)
        model.train()
        for step in range(self.steps):
            check_time(deadline)
            numbers = [order[(step * self.batch + i) % len(order)] for i in range(self.batch)]
            rows = sorted((chosen[number] for number in numbers), key=len)
            tokens += sum(map(len, rows))
            live = sum(label >= 0 for row in rows for label in row.labels)
            total = torch.zeros((), device=self.device)
            for part in _parts(rows, self.rows_at_once):
                with self._precision():
                    loss = response_loss(model, head, padded(part, self.device)) / live
                loss.backward()
                total += loss.detach()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(total)
            if (step + 1) % every == 0 or step + 1 == self.steps:
                curve.append((step + 1, self._held_out(model, head, examples["validation"], deadline)))
                model.train()
        return {"losses": [round(float(loss), 4) for loss in losses], "validation_curve": curve}, tokens

    @torch.no_grad()
    def _held_out(self, model: nn.Module, head: nn.Module, examples: Sequence[Example], deadline: float) -> float:
        model.eval()
        total, count = torch.zeros((), device=self.device, dtype=torch.float64), 0
        for part in _parts(sorted(examples, key=len), 2 * self.rows_at_once):
            check_time(deadline)
            with self._precision():
                total += response_loss(model, head, padded(part, self.device)).double()
            count += sum(label >= 0 for row in part for label in row.labels)
        return round(float(total) / count, 5)

    def _precision(self) -> torch.autocast:
        return torch.autocast(torch.device(self.device).type, torch.bfloat16, enabled=self.autocast)

    @torch.no_grad()
    def _answers(self, model: Any, tokenizer: Any, rows: Sequence[Row]) -> list[str]:
        model.eval()
        answers = []
        for row in rows:
            prompt = torch.tensor([prompt_tokens(row, tokenizer)], device=self.device)
            found = model.generate(
                input_ids=prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                max_new_tokens=self.new_tokens, pad_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
            answers.append(tokenizer.decode(found[0, prompt.shape[1] :], skip_special_tokens=True).strip())
        return answers

    # ---- data ----

    def _material(self) -> tuple[Any, Any, list[Row], dict[str, list[Example]]]:
        """(model in float32, tokenizer, rows to answer, examples by part); loaded once per process."""
        if "material" not in self._loaded:
            model, tokenizer = load_model_and_tokenizer(self.model, torch.float32)
            rows = parts_of(read_rows(self.data), self.test, self.validation)
            examples = {name: tokenize(part, tokenizer, self.max_length) for name, part in rows.items()}
            shown = [row for row in rows["test"] if not row.input and len(row.instruction) < 160][:3]
            self._loaded["material"] = model.to(self.device), tokenizer, shown, examples
        return self._loaded["material"]


def parts_of(rows: Sequence[Row], test: int, validation: int) -> dict[str, list[Row]]:
    """The rows without repetitions, in an order that depends on their number alone, as test, validation and training."""
    different = list({(row.instruction, row.input): row for row in rows}.values())
    order = torch.randperm(len(different), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [different[number] for number in order]
    held_out = test + validation
    return {"test": shuffled[:test], "validation": shuffled[test:held_out], "training": shuffled[held_out:]}


def _parts(rows: Sequence[Example], size: int) -> Iterator[Sequence[Example]]:
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def padded(rows: Sequence[Example], device: str) -> dict[str, Tensor]:
    """Tokens, mask and labels, [rows, longest], padded on the right to a multiple of PAD_TO."""
    length = -(-max(map(len, rows)) // PAD_TO) * PAD_TO
    shape = len(rows), length
    batch = {name: torch.zeros(shape, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    batch["labels"] = torch.full(shape, IGNORED_LABEL)
    for number, row in enumerate(rows):
        batch["input_ids"][number, : len(row)] = torch.tensor(row.tokens)
        batch["attention_mask"][number, : len(row)] = 1
        batch["labels"][number, : len(row)] = torch.tensor(row.labels)
    return {name: tensor.to(device) for name, tensor in batch.items()}


def response_loss(model: Any, head: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Sum of the cross-entropies of all response tokens; only positions that predict one go through the head."""
    labels = batch["labels"][:, 1:]
    live = nn.functional.pad(labels >= 0, (0, 1))
    hook = head.register_forward_pre_hook(lambda _, arguments: (arguments[0][live],))
    try:
        logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], use_cache=False).logits
    finally:
        hook.remove()
    return nn.functional.cross_entropy(logits.float(), labels[labels >= 0], reduction="sum")
