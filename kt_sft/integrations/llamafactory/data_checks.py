"""Data sets and chat templates, looked at while a configuration is parsed: LLaMA-Factory finds faults much later."""

from __future__ import annotations

import importlib
import json
import logging
import os
import re
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from kt_sft import env
from kt_sft.errors import ConfigError, near
from kt_sft.integrations.llamafactory import autoload

logger = logging.getLogger(__name__)

_MAX_BYTES = 16 << 20  # of a data set whose columns are looked at; a larger one takes too long
_PAIRWISE = "rm"  # stage, as data is read for it, whose examples are a chosen and a rejected answer: dpo, too
_MEDIA = ("system", "tools", "images", "videos", "audios", "kto_tag")
# What chat templates put around roles: <|im_start|>, <|turn>, <start_of_turn>, [INST]; of DeepSeek with wide bars.
_MARK = re.compile(
    "<[|\N{FULLWIDTH VERTICAL LINE}][^<>\\s]{1,40}>|<[^<>\\s]{1,40}[|\N{FULLWIDTH VERTICAL LINE}]>"
    "|<(?:start|end)_of_turn>|\\[/?[A-Z_]{3,20}\\]"
)


def check(data_args: Any) -> None:
    """Raise unless the template is known and the data sets are there, with the columns that are read.

    Args:
        data_args: LLaMA-Factory's DataArguments.
    Raises:
        ConfigError: lists every fault.
    """
    faults = []
    templates = importlib.import_module("llamafactory.data.template").TEMPLATES
    if data_args.template is not None and data_args.template not in templates:
        faults.append(f"template: {data_args.template}: unknown; {_hint(data_args.template, templates)}")
    if not (data_args.tokenized_path and os.path.isdir(data_args.tokenized_path)):
        for key in ("dataset", "eval_dataset"):
            faults += _dataset_faults(key, getattr(data_args, key, None) or [], data_args)
    if faults:
        raise ConfigError(faults)


def _dataset_faults(key: str, names: list[str], data_args: Any) -> Iterator[str]:
    folder = data_args.dataset_dir
    if not names or not isinstance(folder, str) or folder == "ONLINE" or folder.startswith("REMOTE:"):
        return
    file = os.path.join(folder, "dataset_info.json")
    try:
        with open(file, encoding="utf-8") as opened:
            known = json.load(opened)
    except (OSError, ValueError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or f"no JSON: {error}"
        yield f"dataset_dir: {file}: expected the list of data sets, found {reason}; correct the path"
        return
    parser = importlib.import_module("llamafactory.data.parser")
    for name in names:
        if name not in known:
            yield f"{key}: {name}: not in {file}; {_hint(name, known)}"
            continue
        try:
            (attributes,) = parser.get_dataset_list([name], folder)
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            yield f"{key}: {name}: entry of {file} cannot be read: {type(error).__name__}: {error}"
            continue
        if attributes.load_from == "file":
            yield from (f"{key}: {name}: {fault}" for fault in _file_faults(attributes, folder))


def _file_faults(attributes: Any, folder: str) -> Iterator[str]:
    path = os.path.join(folder, attributes.dataset_name)
    files = sorted(os.path.join(path, name) for name in os.listdir(path)) if os.path.isdir(path) else [path]
    types = importlib.import_module("llamafactory.extras.constants").FILEEXT2TYPE
    if not files or not os.path.isfile(files[0]):
        yield f"expected the file {files[0] if files else path}, found nothing; correct file_name in dataset_info.json"
        return
    if foreign := [file for file in files if os.path.splitext(file)[1][1:] not in types]:
        yield f"{foreign[0]}: expected a file of the types {', '.join(types)}"
        return
    if len(files) > 1 or types[os.path.splitext(path)[1][1:]] != "json" or os.path.getsize(path) > _MAX_BYTES:
        return
    try:
        with open(path, encoding="utf-8") as opened:
            text = opened.read()
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.splitlines()]
    except (ValueError, RecursionError) as error:
        yield f"{path}: expected JSON, or a JSON object in each line, found {error}"
        return
    if not rows or not all(isinstance(row, dict) for row in rows):
        yield f"{path}: expected a list of objects, found {'none' if not rows else 'other values'}"
        return
    columns = set().union(*rows)
    missing = [name for name in _columns(attributes) if name not in columns]
    if missing:
        found = f"{path}: column {', '.join(missing)} is missing, found {', '.join(sorted(columns))}"
        yield f"{found}; name the columns under `columns` in dataset_info.json"


def _columns(attributes: Any) -> Iterator[str]:
    """Names of the columns that LLaMA-Factory's converters read in every row."""
    is_alpaca = attributes.formatting == "alpaca"
    keys = ("prompt", "query", "history", *_MEDIA) if is_alpaca else ("messages", *_MEDIA)
    answers = ("chosen", "rejected") if attributes.ranking else ("response",) if is_alpaca else ()
    yield from (column for key in (*keys, *answers) if (column := getattr(attributes, key)))


def _hint(name: object, known: Any) -> str:
    close = near(name, known)
    if close is not None:
        return f"did you mean {close!r}?"
    few = sorted(known)[:8]
    return f"known: {', '.join(few)}{', ...' if len(known) > len(few) else ''}"


def patch_loader(loader: ModuleType) -> None:
    """`_get_merged_dataset`: a data set for another stage is one line, before any is read."""
    autoload.require(loader, "_get_merged_dataset", "get_dataset_list")
    stock = loader._get_merged_dataset

    def merged(names: list[str] | None, model_args: Any, data_args: Any, training_args: Any, stage: str, *rest, **more):
        folder = data_args.dataset_dir
        for attributes in loader.get_dataset_list(names, folder) if getattr(data_args, "kt_active", False) else ():
            if attributes.ranking != (stage == _PAIRWISE):
                found = "pairs of a chosen and a rejected answer" if attributes.ranking else "single answers"
                where = f"{attributes} has {found} (ranking in {folder}/dataset_info.json)"
                raise ConfigError(f"dataset: {where}, which this stage does not read")
        return stock(names, model_args, data_args, training_args, stage, *rest, **more)

    loader._get_merged_dataset = merged


def patch_template(template: ModuleType) -> None:
    """`get_template_and_fix_tokenizer`: a line where the template is one of other models, before data is tokenised."""
    autoload.require(template, "get_template_and_fix_tokenizer", "TEMPLATES")
    stock = template.get_template_and_fix_tokenizer

    def get_template_and_fix_tokenizer(tokenizer: Any, data_args: Any) -> Any:
        chosen = template.TEMPLATES.get(data_args.template)
        if getattr(data_args, "kt_active", False) and chosen is not None and env.local_rank() == 0:
            fault = misfit(data_args.template, chosen, tokenizer)
            if fault is not None:
                logger.warning("kt_sft: template: %s", fault)
        return stock(tokenizer, data_args)

    template.get_template_and_fix_tokenizer = get_template_and_fix_tokenizer


def misfit(name: str, template: Any, tokenizer: Any) -> str | None:
    """Why a template is not the one of a tokenizer's model; None: nothing speaks against it.

    A model that has learnt roles has a token of its own for each mark of its chat template. A template with marks that
    are no tokens of it, or with none of these marks, was made for another model.

    Args:
        template: LLaMA-Factory's.
        tokenizer: as it was loaded, before the template's words are added to it.
    """
    own_text = tokenizer.chat_template
    own_text = " ".join(map(str, own_text.values())) if isinstance(own_text, dict) else own_text or ""
    vocabulary = tokenizer.get_vocab()
    general = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}  # not of roles
    own = {mark for mark in _MARK.findall(own_text) if mark in vocabulary} - general
    if not own:
        return None
    texts = [slot if isinstance(slot, str) else "".join(map(str, slot.values()) if isinstance(slot, dict) else ())
             for formatter in (template.format_user, template.format_assistant, template.format_prefix)
             for slot in formatter.slots]  # fmt: skip
    marks = set(_MARK.findall(" ".join([*texts, *template.stop_words])))
    foreign = sorted(mark for mark in marks if mark not in vocabulary)
    if not foreign and marks & own:
        return None
    found = f"has {', '.join(foreign[:3])}, no tokens of this model" if foreign else "has none of this model's marks"
    return (
        f"{name} {found}, whose own chat template has {', '.join(sorted(own)[:3])}; the model would learn and be "
        "asked in a format that it does not know; take the template of its family"
    )
