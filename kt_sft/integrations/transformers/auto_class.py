"""Which of transformers' classes makes a model from its config: its own wherever it has one.

Checkpoints bring code of their own (`auto_map` in config.json). That of a model which transformers has learnt since is
written for an older release and does not import today, or keeps every expert as a module of its own. So remote code
runs only where it is trusted and transformers has no class for the `model_type`.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PretrainedConfig,
)

from kt_sft import env
from kt_sft.errors import KTError, UnsupportedModel
from kt_sft.models import kimi_k2

kimi_k2.register()

logger = logging.getLogger(__name__)

HUB_ARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
_KINDS = (AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMultimodalLM)


def auto_class(config: PretrainedConfig) -> Any:
    """The auto class for text generation with this config, of a model that also sees or hears the one with all parts.

    Remote code says by its `auto_map` what it serves; AutoModelForCausalLM is also the answer where nothing fits, since
    its message lists the known models.
    """
    kinds = _KINDS
    if config.get_text_config() is not config:
        kinds = kinds[1:] + kinds[:1]
    remote = getattr(config, "auto_map", None) or {}
    for kind in kinds:
        if kind.__name__ in remote or type(config) in kind._model_mapping:
            return kind
    return AutoModelForCausalLM


@contextmanager
def errors_in_one_line(
    path: str | os.PathLike[str], what: str = "", trust_remote_code: bool | None = True
) -> Iterator[None]:
    """Errors of transformers' checks of a file, of tokenizers, or of the model's own code, as one line.

    Args:
        path: directory, file or name of the model.
        what: what is read of it; empty: its config.
        trust_remote_code: as `from_pretrained` gets it; where it is what is missing, the message says so.
    Raises:
        UnsupportedModel: with the key that transformers names.
    """
    try:
        yield
    except KTError:
        raise
    except BaseException as error:
        # That of the tokenizers library, which is written in Rust, is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        needs_trust = not trust_remote_code and "trust_remote_code" in str(error)
        trust = "allow the code beside it with --trust-remote-code, or trust_remote_code: true, if you trust it"
        where = f"{os.fspath(path)}: {what}" if what else config_file(path)
        remedy = trust if needs_trust else ("download it again" if what else "")
        expected = "what transformers takes" if what else "the config of a known model"
        raise UnsupportedModel(where, expected=expected, found=_in_words(error), remedy=remedy) from error


def config_file(path: str | os.PathLike[str]) -> str:
    """What messages call the config of a directory, a file or a name."""
    return os.path.join(path, "config.json") if os.path.isdir(path) else os.fspath(path)


def _in_words(error: BaseException) -> str:
    """What an error of transformers says: its checks name the field in one line and the reason in the next."""
    is_check = type(error).__name__.startswith("StrictDataclass")
    text = " ".join(" ".join(str(error).strip().splitlines()[: 2 if is_check else 1]).split())[:300]
    says_little = isinstance(error, LookupError | AttributeError | AssertionError | ArithmeticError) or not text
    return f"{type(error).__name__}{': ' if text else ''}{text}" if says_little else text


def read_auto_config(path: str | os.PathLike[str], *, trust_remote_code: bool | None = None, **kwargs: Any) -> Any:
    """`AutoConfig.from_pretrained`, with transformers' own class for every `model_type` that it has a model for.

    Such a config no longer names the code beside it, so that every auto class takes transformers' model, too.

    Args:
        kwargs: as there; `return_unused_kwargs` gives a pair.
    Raises:
        UnsupportedModel: a model that transformers does not know, or values that it does not take.
    """
    is_native = has_native_class(path, **{name: kwargs[name] for name in HUB_ARGS if name in kwargs})
    trusts = False if is_native else trust_remote_code
    with errors_in_one_line(path, trust_remote_code=trust_remote_code):
        found = AutoConfig.from_pretrained(path, trust_remote_code=trusts, **kwargs)
        config = found[0] if isinstance(found, tuple) else found
        if is_native and _forget_code(config) and trust_remote_code:
            _say_once(os.fspath(path), config.model_type)
    return found


def has_native_class(path: str | os.PathLike[str], **hub_kwargs: Any) -> bool:
    """Whether transformers has a model class of its own, or we registered one, for a checkpoint."""
    with errors_in_one_line(path):
        model_type = PretrainedConfig.get_config_dict(path, **hub_kwargs)[0].get("model_type")
    if not isinstance(model_type, str) or model_type not in CONFIG_MAPPING:
        return False
    return any(CONFIG_MAPPING[model_type] in kind._model_mapping for kind in _KINDS)


def _forget_code(config: PretrainedConfig) -> bool:
    """Take config and model classes out of a config's `auto_map`; whether there were any."""
    names = getattr(config, "auto_map", None) or {}
    kept = {name: code for name, code in names.items() if name != "AutoConfig" and not name.startswith("AutoModel")}
    if kept:
        config.auto_map = kept
    elif names:
        del config.auto_map
    return len(kept) < len(names)


@functools.cache
def _say_once(path: str, model_type: str) -> None:
    if env.local_rank() == 0:
        logger.warning("%s: transformers' own class for %s is used, and the model code beside it not", path, model_type)
