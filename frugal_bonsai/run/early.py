"""Refuse what options, paths and headers show to be impossible, before torch is imported.

In: a command's options. Out: nothing, or an error within a second. A model on this disk is opened
for its headers. Hub models, weights and texts are left to the command, which checks again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from frugal_bonsai.bonsai.methods import make_settings
from frugal_bonsai.bonsai.settings import STATE_FILE
from frugal_bonsai.checkpoint.commit import require_writable
from frugal_bonsai.checkpoint.locate import local_model
from frugal_bonsai.errors import OptionError, StateError
from frugal_bonsai.evaluation.harness import find_task_data, require_harness, split_names
from frugal_bonsai.evaluation.llama_cpp import LLAMA_CPP, require_llama_cpp
from frugal_bonsai.hardware.profile import find_profile, read_profile, require_replaceable
from frugal_bonsai.memory.budget import require_device_name
from frugal_bonsai.model.family import ModelSpec
from frugal_bonsai.model.layout import layout_rules
from frugal_bonsai.report.pages.figures import require_plots
from frugal_bonsai.rewrite.mask_file import read_mask
from frugal_bonsai.run.evaluate_gguf import find_gguf
from frugal_bonsai.run.from_config import config_folder
from frugal_bonsai.run.open import open_model
from frugal_bonsai.run.options import (
    AdaptOptions,
    BenchOptions,
    CommandOptions,
    EvalOptions,
    PruneOptions,
)
from frugal_bonsai.run.output import require_output_file, require_output_folder
from frugal_bonsai.run.report import page_kind, require_page
from frugal_bonsai.run.run_folder import holds_files, run_folder
from frugal_bonsai.run.texts import DEFAULT_WINDOW, choose_window, require_stride
from frugal_bonsai.sizes import parse_bytes
from frugal_bonsai.text.sources import require_source


def check_prune(
    model: str,
    out: Path | None,
    options: PruneOptions,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Check the options of ``prune``, or of ``plan`` if ``out`` is None.

    Raises:
        FrugalBonsaiError: The prune cannot work.
    """
    make_settings(options.method, options.settings)
    _check_common(options)
    if out is not None:
        require_output_folder(out, model, overwrite=overwrite)
    if out is not None and not resume and (run_folder(out) / STATE_FILE).exists():
        raise _unfinished(run_folder(out))
    if options.profile is not None:
        read_profile(find_profile(options.profile))
    if out is not None:
        require_source(options.source_for(model), "--calibration", sampled=True)
        if options.eval_text is not None:
            require_source(options.eval_text, "--eval-text")
        if options.eval_tasks:
            find_task_data(split_names(options.eval_tasks), options.task_data)
            require_harness("--eval-tasks")
    if out is None and config_folder(model) is not None:
        return  # planned from shapes that transformers' class has, which takes torch
    spec = _local_spec(model, options.assume_family, text_only=options.text_only)
    if spec is not None:
        choose_window(spec, options.window)
        layout_rules(spec, options.layout, tile=options.tile, as_mistral=options.as_mistral)


def check_adapt(
    pruned: str,
    out: Path | None,
    options: AdaptOptions,
    *,
    resume: bool = False,
    overwrite: bool = False,
) -> None:
    """Check the options of ``adapt``, or of its plan if ``out`` is None.

    Raises:
        FrugalBonsaiError: The adaptation cannot work.
    """
    options.training()
    _check_common(options)
    if out is not None:
        require_output_folder(out, pruned, options.teacher, overwrite=overwrite)
    if out is not None and not resume and holds_files(run_folder(out)):
        raise _unfinished(run_folder(out))
    if options.eval_text is not None:
        require_source(options.eval_text, "--eval-text")
    for source in options.data:
        require_source(source, "--data", sampled=True)
    options.objective()
    if options.teacher_cache is not None:
        require_writable(Path(options.teacher_cache))
    spec = _local_spec(pruned, text_only=options.text_only)
    if options.teacher is not None:
        spec = _local_spec(options.teacher)
    if spec is not None:
        choose_window(spec, options.window)


def check_shrink(
    model: str,
    mask: Path,
    out: Path,
    *,
    max_shard_size: str | int,
    assume_family: str | None,
    text_only: bool,
    overwrite: bool = False,
) -> None:
    """Check the options of ``shrink``.

    Raises:
        FrugalBonsaiError: The mask, the model's headers or the output cannot be used.
    """
    parse_bytes(max_shard_size, option="--max-shard-size")
    require_output_folder(out, model, overwrite=overwrite)
    if not mask.is_file():
        raise OptionError(f"--mask {mask}: cannot be read (there is no such file); check the path")
    spec = _local_spec(model, assume_family, text_only=text_only)
    if spec is not None:
        read_mask(mask, spec)


def check_export(model: str, out: Path, *, overwrite: bool = False) -> None:
    """Check the options of ``export``.

    Raises:
        FrugalBonsaiError: The model's headers or the output cannot be used.
    """
    require_output_file(out, model, overwrite=overwrite)
    _local_spec(model)


def check_eval(model: str, options: EvalOptions) -> dict[str, Path]:
    """Check the options of ``eval``; return the local file of each task that has one.

    Raises:
        FrugalBonsaiError: An option cannot work, or the text or the model's headers cannot be used.
    """
    text, tasks = options.text, split_names(options.tasks)
    if text is None and not tasks:
        raise OptionError("eval needs --text SOURCE, --tasks NAME,... or both")
    if text is not None:
        require_source(text, "--text")
    for option, value in {"--task-data": options.task_data, "--limit": options.limit}.items():
        if value and not tasks:
            raise OptionError(f"{option} is for --tasks; name tasks, or omit it")
    files = find_task_data(tasks, options.task_data)
    _check_window(options.window)
    if options.stride is not None:
        if text is None:
            raise OptionError("--stride is for --text; name a text, or omit it")
        require_stride(options.stride, options.window or DEFAULT_WINDOW)
    if options.runtime == LLAMA_CPP:
        given = {
            "--tasks": tasks,
            "--weights": options.weights != "native",
            "--max-gpu-mem": options.max_gpu_mem,
            "--max-cpu-mem": options.max_cpu_mem,
            "--device": options.device,
            "--assume-family": options.assume_family,
        }
        _refuse_for_llama_cpp([option for option, value in given.items() if value])
        find_gguf(model)
        require_llama_cpp()
        return files
    if tasks:
        require_harness()
    _ = options.caps  # raises for a cap that is not a size
    require_device_name(options.device)
    spec = _local_spec(model, options.assume_family)
    if spec is not None:
        choose_window(spec, options.window)
    return files


def _refuse_for_llama_cpp(options: list[str]) -> None:
    """Raise for options that are for the streamed runtime."""
    if options:
        raise OptionError(
            f"--runtime {LLAMA_CPP} does not know {', '.join(options)}: llama.cpp holds the whole "
            "model, in the number formats of its file; omit these options"
        )


def check_bench(dense: str, pruned: str, options: BenchOptions) -> None:
    """Check the options of ``bench``.

    Raises:
        FrugalBonsaiError: An option cannot work, or a model's headers cannot be used.
    """
    require_device_name(options.device)
    if options.runtime == LLAMA_CPP:
        require_llama_cpp()
    for model in (dense, pruned):
        if options.runtime == LLAMA_CPP:
            find_gguf(model)
        else:
            _local_spec(model)


def check_profile(out: Path | None, folder: Path, device: str | None) -> None:
    """Check the options of ``profile``.

    Raises:
        FrugalBonsaiError: The output would replace another file, or nothing can be written.
    """
    require_device_name(device)
    if not folder.is_dir():
        raise OptionError(f"--dir {folder}: is no folder; name one on the disk to measure")
    require_writable(folder / "measured")
    if out is not None:
        require_replaceable(out)
        require_writable(out)


def check_page(page: Path, profiles: Sequence[str], *, overwrite: bool) -> None:
    """Check the options of a page on machines.

    Raises:
        OptionError: Another file is there, a profile cannot be read, or matplotlib is missing.
        OutputError: Nothing can be written there.
    """
    for name in profiles:
        read_profile(find_profile(name))
    if page_kind(page) == "html":
        require_plots()
    require_page(page, overwrite=overwrite)
    require_writable(page)


def _check_window(window: int | None) -> None:
    if window is not None and window < 2:
        raise OptionError(f"--window: {window} is not at least 2 tokens")


def _check_common(options: CommandOptions) -> None:
    """Check caps, sizes, window and device."""
    _ = options.caps  # parsed here: raises if a cap has no unit
    parse_bytes(options.max_shard_size, option="--max-shard-size")
    _check_window(options.window)
    require_device_name(options.device)


def _local_spec(
    model: str, assume_family: str | None = None, *, text_only: bool = True
) -> ModelSpec | None:
    """Return the description of a model on this disk; None of a hub model."""
    if local_model(model) is None:
        return None
    with open_model(
        model,
        headers_only=True,
        assume_family=assume_family,
        text_only=text_only,
        check_config=False,
    ) as opened:
        return opened.spec


def _unfinished(folder: Path) -> StateError:
    return StateError(
        f"{folder}: holds an unfinished run; continue it with --resume, or delete that folder"
    )
