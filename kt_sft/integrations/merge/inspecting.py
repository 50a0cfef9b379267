"""Adapters on disk together with the model they name: opening one of any form, and a report of what it holds."""

from __future__ import annotations

import os

from kt_sft.adapters.forms import adapter_file, base_name, open_adapter
from kt_sft.adapters.model import Adapter
from kt_sft.adapters.report import Report, begin_report, complete_report
from kt_sft.errors import KTError
from kt_sft.integrations.transformers.base_model import default_name, find_base_model


def open_with_base(
    path: str | os.PathLike[str], base_model: str | None = None, *, trust_remote_code: bool = False
) -> Adapter:
    """Open an adapter of any form.

    Args:
        base_model: directory of its model; None: the one that it names.
        trust_remote_code: whether code beside the model's config.json may run.
    Raises:
        KTError: no adapter, a damaged one, no base model, or the two do not fit.
    """
    source = adapter_file(path)
    name = base_model or default_name(base_name(source), source)
    return open_adapter(source, find_base_model(name, adapter=source, trust_remote_code=trust_remote_code))


def inspect(path: str | os.PathLike[str], base_model: str | None = None, *, trust_remote_code: bool = False) -> Report:
    """What an adapter holds and what is wrong with it; without its model only what its own files tell.

    Raises:
        KTError: no adapter there, or files that cannot be read.
    """
    source = adapter_file(path)
    report = begin_report(source)
    name = base_model or default_name(base_name(source), source)
    try:
        base = find_base_model(name, adapter=source, trust_remote_code=trust_remote_code)
    except KTError as error:
        if base_model is not None:
            raise
        report.notes.append(f"names and shapes were not compared with the model: {error}")
        return report
    try:
        complete_report(report, open_adapter(source, base, reads_headers_only=True))
    except KTError as error:
        report.problems.append(str(error))
    return report
