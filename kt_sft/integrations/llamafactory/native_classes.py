"""transformers' own classes, in LLaMA-Factory's loader, for models it knows; see `transformers.auto_class` beside."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType, SimpleNamespace
from typing import Any

from kt_sft.integrations.llamafactory import autoload
from kt_sft.integrations.transformers.auto_class import errors_in_one_line, has_native_class, read_auto_config


def patch_loader(loader: ModuleType, is_active: Callable[[Any], bool]) -> None:
    """`load_config`: the model's class follows from the config. `load_tokenizer`: its remote code may be wanted, that
    of the config, which tokenizers and processors read as well, is not. `register_autoclass`: code is saved beside a
    checkpoint where there is some.
    """
    autoload.require(loader, "load_config", "load_tokenizer", "register_autoclass", "_get_init_kwargs", "AutoConfig")
    stock_config, stock_tokenizer, stock_register = loader.load_config, loader.load_tokenizer, loader.register_autoclass

    def load_config(model_args: Any) -> Any:
        if not is_active(model_args):
            return stock_config(model_args)
        kwargs = loader._get_init_kwargs(model_args)
        return read_auto_config(model_args.model_name_or_path, **kwargs)

    def load_tokenizer(model_args: Any) -> Any:
        if not is_active(model_args):
            return stock_tokenizer(model_args)
        with errors_in_one_line(model_args.model_name_or_path, "tokenizer"), _its_cause():
            hub = {k: v for k, v in loader._get_init_kwargs(model_args).items() if k != "trust_remote_code"}
            if not model_args.trust_remote_code or not has_native_class(model_args.model_name_or_path, **hub):
                return stock_tokenizer(model_args)
            with _without_code_of_configs(loader.AutoConfig):
                return stock_tokenizer(model_args)

    def register_autoclass(config: Any, model: Any, tokenizer: Any) -> None:
        # It goes by the tokenizer's `auto_map`, also where transformers has left the class of that name aside: saving
        # would then look for a file of transformers' own code, and fail.
        has_no_code = hasattr(model, "kt_config") and type(tokenizer).__module__.startswith("transformers.")
        stock_register(config, model, SimpleNamespace(init_kwargs={}) if has_no_code else tokenizer)

    loader.load_config, loader.load_tokenizer = load_config, load_tokenizer
    loader.register_autoclass = register_autoclass


@contextmanager
def _its_cause() -> Iterator[None]:
    """LLaMA-Factory puts "Failed to load tokenizer." around the error that says why."""
    try:
        yield
    except OSError as error:
        raise error.__cause__ or error from None


@contextmanager
def _without_code_of_configs(auto_config: type) -> Iterator[None]:
    """Within it, transformers reads configs with its own classes, whatever the code beside them."""
    stock = vars(auto_config)["from_pretrained"]

    def from_pretrained(cls: type, *args: Any, **kwargs: Any) -> Any:
        return stock.__get__(None, cls)(*args, **{**kwargs, "trust_remote_code": False})

    auto_config.from_pretrained = classmethod(from_pretrained)
    try:
        yield
    finally:
        auto_config.from_pretrained = stock
