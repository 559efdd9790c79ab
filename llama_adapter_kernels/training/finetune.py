"""Fine-tuning of an adapter on instruction data: from files to files. The recipe is the paper's (arXiv 2303.16199)."""

import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from llama_adapter_kernels import hub
from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.media.encoders import Encoder
from llama_adapter_kernels.models import load_model, load_tokenizer, pick_dtype, weights_fingerprint
from llama_adapter_kernels.training.checkpoints import last_whole_checkpoint
from llama_adapter_kernels.training.config_file import write_config
from llama_adapter_kernels.training.data import SUFFIXES, read_conversations
from llama_adapter_kernels.training.dry_run import rehearse
from llama_adapter_kernels.training.fused_parts import fuse_parts, wants_liger
from llama_adapter_kernels.training.held_out import split_off
from llama_adapter_kernels.training.loop import Outcome, check_steps, device_of, plan_steps, train
from llama_adapter_kernels.training.model_card import write_card
from llama_adapter_kernels.training.preparation import (
    attach,
    attach_senses,
    check_budgets,
    check_evaluation,
    check_held_out,
    check_media,
    check_tokens,
    encoder_of,
    fitted_settings,
)
from llama_adapter_kernels.training.quantisation import loading_options
from llama_adapter_kernels.training.reporters import reports_of
from llama_adapter_kernels.training.run_folder import check_output, claim, data_fingerprint, prepare_output
from llama_adapter_kernels.training.settings import Execution, Settings, Task, check_settings
from llama_adapter_kernels.training.sharding import heed_launcher
from llama_adapter_kernels.training.templates import choose_template
from llama_adapter_kernels.training.tokens import Example, tokenize

log = logging.getLogger(__name__)

_UPLOAD = "--push-to-hub"


@dataclass(frozen=True)
class Prepared:
    """What there is before a weight is loaded: settings with everything filled in, the data as tokens."""

    settings: Settings
    examples: list[Example]
    held_out: list[Example]
    fingerprints: dict[str, str]
    encoder: Encoder | None


def finetune(
    model: str,
    data: Path | Sequence[Path],
    output: Path,
    settings: Settings | None = None,
    execution: Execution | None = None,
    *,
    eval_data: Path | Sequence[Path] = (),
    resume: bool = False,
    overwrite: bool = False,
    skip_bad_rows: bool = False,
) -> Outcome:
    """Fine-tunes an adapter for `model` (a folder or a hub name) on the rows in `data` and saves it in `output`.

    `data` are files, folders or data sets on the hub, see `read_conversations`; so are `eval_data`, by whose loss the best
    checkpoint is chosen.

    `output` receives zero_gate_adapter.json and the weights, README.md (a model card), config.yaml (what the run was given),
    checkpoint-*/ (adapter and optimizer), run.json (what a resumed run must have), training_log.csv and tensorboard/. Under
    torchrun the processes share every step.

    Raises:
        UserError: data, folders, settings or model do not fit; the message says what and where.
    """
    paths, eval_paths = ([given] if isinstance(given, Path) else list(given) for given in (data, eval_data))
    task = Task(
        model, paths, output, eval_paths or None, resume=resume, overwrite=overwrite, skip_bad_rows=skip_bad_rows
    )
    outcome = run_task(task, settings or Settings(), execution or Execution())
    assert isinstance(outcome, Outcome)
    return outcome


def run_task(task: Task, settings: Settings, execution: Execution) -> Outcome | str:
    """As `finetune`; of a dry run what it would be, in words.

    Raises:
        UserError: as `finetune`.
    """
    asked, main_process = execution, int(os.environ.get("RANK", "0")) == 0
    device = device_of(execution)
    execution = replace(execution, device=str(device), on_cpu=device.type == "cpu")
    check_settings(settings, execution)
    execution = heed_launcher(execution)
    reports_of(execution)
    fused = wants_liger(settings, execution, device)
    if main_process:
        check_output(task.output, resume=task.resume, overwrite=task.overwrite)
        if task.output.is_dir():
            with claim(task.output):  # or another process is training into it
                pass
        if execution.push_to_hub is not None:
            hub.check_upload(execution.push_to_hub, _UPLOAD)
    ready = prepare(task, settings, execution)
    settings = ready.settings
    dtype = pick_dtype(_weights(settings), on_cpu=execution.on_cpu)
    network = load_model(task.model, dtype, **loading_options(task.model, settings.quantize, dtype, device))
    check_tokens([*ready.examples, *ready.held_out], network)
    if fused:
        fuse_parts(network)
    if task.dry_run:
        attach(network, settings)
        attach_senses(network, ready.encoder, settings, execution)
        return rehearse(network, ready.examples, ready.held_out, settings, execution)
    run = {
        "model": task.model,
        "base_sha256": weights_fingerprint(task.model),
        **ready.fingerprints,
        "settings": asdict(settings),
    }
    output = task.output
    with claim(output) if main_process else nullcontext():
        checkpoint = checkpoint_to_resume(output) if task.resume else None
        if main_process:
            check_output(output, resume=task.resume, overwrite=task.overwrite)  # perhaps another process's meanwhile
            if checkpoint is not None:
                check_steps(output, plan_steps(ready.examples, settings), checkpoint)
            prepare_output(output, run, resume=task.resume)
            note_config(task, settings, asked)
        adapter = attach(network, settings, checkpoint)
        attach_senses(network, ready.encoder, settings, execution, checkpoint)
        outcome = train(
            network,
            adapter,
            ready.examples,
            output,
            settings,
            execution,
            held_out=ready.held_out,
            checkpoint=checkpoint,
        )
        if main_process and outcome.finished:
            write_card(task, settings, asked, outcome)
            if execution.push_to_hub is not None:
                upload(output, execution.push_to_hub)
    return outcome


def prepare(task: Task, settings: Settings, execution: Execution) -> Prepared:
    """Reads and checks everything that can be checked without the model's weights.

    Raises:
        UserError: as `finetune`.
    """
    eval_paths = task.eval_data or []
    check_evaluation(settings, eval_paths)
    named = ", ".join(map(str, task.data))
    rows = read_conversations(fetched(task.data), skip_bad_rows=task.skip_bad_rows)
    check_media(named, rows, settings)
    eval_rows = read_conversations(fetched(eval_paths), skip_bad_rows=task.skip_bad_rows)
    encoder = encoder_of(settings)
    settings = fitted_settings(task.model, settings)
    tokenizer = load_tokenizer(task.model)
    template = choose_template(settings.template, tokenizer, rows)
    settings = replace(settings, template=template.name)
    assert settings.max_length is not None
    examples = tokenize(rows, tokenizer, settings.max_length, template)
    if not any(example.prompt_length < len(example) for example in examples):
        raise UserError(f"{named}: no example has room for a response within {settings.max_length} tokens")
    held_out = tokenize(eval_rows, tokenizer, settings.max_length, template)
    fingerprints = {"data_sha256": data_fingerprint(rows, examples)}
    if held_out:
        fingerprints["eval_sha256"] = data_fingerprint(eval_rows, held_out)
    elif settings.eval_fraction is not None:
        examples, held_out = split_off(examples, settings.eval_fraction, settings.seed)
    check_held_out(held_out, settings)
    check_budgets(examples, settings, execution)
    return Prepared(settings, examples, held_out, fingerprints, encoder)


def fetched(paths: Sequence[Path]) -> list[Path]:
    """The files and folders, with those of data sets on the hub in place of their names.

    Raises:
        UserError: a data set cannot be had.
    """
    return [
        hub.dataset_folder(str(path), SUFFIXES) if path.suffix not in SUFFIXES and hub.is_hub_name(str(path)) else path
        for path in paths
    ]


def note_config(task: Task, settings: Settings, execution: Execution) -> None:
    """Writes the YAML file of the run into its folder.

    Raises:
        UserError: it could not be written.
    """
    try:
        write_config(task.output, task, settings, execution)
    except OSError as error:
        raise UserError(f"{task.output}: {error.strerror}") from None


def upload(folder: Path, name: str) -> None:
    """Uploads a finished run's adapter.

    Raises:
        UserError: it did not work.
    """
    try:
        log.info("uploaded to %s", hub.upload(folder, name, _UPLOAD))
    except UserError as error:
        again = f"llama_adapter_kernels.hub.upload({str(folder)!r}, {name!r}) repeats it"
        raise UserError(f"{error}; the adapter is saved in {folder}, {again}") from error


def _weights(settings: Settings) -> str:
    return "float32" if settings.autocast else settings.dtype


def checkpoint_to_resume(output: Path) -> Path | None:
    """The newest whole checkpoint, with a word about newer ones that are not; None: from the beginning."""
    whole, broken = last_whole_checkpoint(output)
    for path, problem in broken.items():
        log.warning("%s is incomplete (%s): %s", path, problem, f"going on from {whole}" if whole else "not used")
    if whole is None:
        log.warning("%s: no whole checkpoint yet: starting from the beginning", output)
    return whole
