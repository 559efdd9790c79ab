"""Fine-tuning of an adapter on instruction data: from files to files. The recipe is the paper's (arXiv 2303.16199)."""

import logging
import os
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path

from llama_adapter_kernels.errors import UserError
from llama_adapter_kernels.models import (
    load_model,
    load_tokenizer,
    pick_dtype,
    weights_fingerprint,
)
from llama_adapter_kernels.training.checkpoints import last_whole_checkpoint
from llama_adapter_kernels.training.data import read_conversations
from llama_adapter_kernels.training.held_out import split_off
from llama_adapter_kernels.training.loop import Outcome, train
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
from llama_adapter_kernels.training.run_folder import (
    check_output,
    claim,
    data_fingerprint,
    prepare_output,
)
from llama_adapter_kernels.training.settings import Execution, Settings, check_settings
from llama_adapter_kernels.training.sharding import heed_launcher
from llama_adapter_kernels.training.templates import choose_template
from llama_adapter_kernels.training.tokens import tokenize

log = logging.getLogger(__name__)


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

    `data` are files or folders, see `read_conversations`; so are `eval_data`, by whose loss the best checkpoint is chosen.

    `output` receives zero_gate_adapter.json and the weights, checkpoint-*/ (adapter and optimizer), run.json (settings),
    training_log.csv and tensorboard/. Under torchrun the processes share every step.

    Raises:
        UserError: data, folders, settings or model do not fit; the message says what and where.
    """
    settings, execution = settings or Settings(), execution or Execution()
    check_settings(settings, execution)
    execution = heed_launcher(execution)
    main_process = int(os.environ.get("RANK", "0")) == 0
    if main_process:
        check_output(output, resume=resume, overwrite=overwrite)
        if output.is_dir():
            with claim(output):  # or another process is training into it
                pass
    paths, eval_paths = ([given] if isinstance(given, Path) else list(given) for given in (data, eval_data))
    check_evaluation(settings, eval_paths)
    named = ", ".join(map(str, paths))
    rows = read_conversations(paths, skip_bad_rows=skip_bad_rows)
    check_media(named, rows, settings)
    eval_rows = read_conversations(eval_paths, skip_bad_rows=skip_bad_rows)
    encoder = encoder_of(settings)
    settings = fitted_settings(model, settings)
    tokenizer = load_tokenizer(model)
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
    network = load_model(model, pick_dtype(settings.dtype, on_cpu=execution.on_cpu))
    check_tokens([*examples, *held_out], network)
    run = {
        "model": model,
        "base_sha256": weights_fingerprint(model),
        **fingerprints,
        "settings": asdict(settings),
    }
    with claim(output) if main_process else nullcontext():
        if main_process:
            check_output(output, resume=resume, overwrite=overwrite)  # it may have been another process's meanwhile
            prepare_output(output, run, resume=resume)
        checkpoint = checkpoint_to_resume(output) if resume else None
        adapter = attach(network, settings, checkpoint)
        attach_senses(network, encoder, settings, execution, checkpoint)
        return train(network, adapter, examples, output, settings, execution, held_out=held_out, checkpoint=checkpoint)


def checkpoint_to_resume(output: Path) -> Path | None:
    """The newest whole checkpoint, with a word about newer ones that are not; None: from the beginning."""
    whole, broken = last_whole_checkpoint(output)
    for path, problem in broken.items():
        log.warning("%s is incomplete (%s): %s", path, problem, f"going on from {whole}" if whole else "not used")
    if whole is None:
        log.warning("%s: no whole checkpoint yet: starting from the beginning", output)
    return whole
