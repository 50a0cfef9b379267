"""LLaMA Board, the page of `llamafactory-cli webui`: a panel with the settings of kt_sft, which all its tabs follow.

The stock page passes fixed sets of arguments; its boxes for extra arguments exist in three of four tabs only.
"""

from __future__ import annotations

import json
from types import ModuleType
from typing import Any

import torch

from kt_sft.config import METHODS
from kt_sft.integrations.llamafactory.autoload import require

_FIELDS = ("use_kt", "kt_method", "kt_weight_path", "kt_settings")  # names in the page's list of elements


def patch_interface(interface: ModuleType) -> None:
    """`create_top`: the panel. The classes behind the tabs: read it. `create_export_tab`: extra arguments with use_kt.

    `interface` is imported last of the page's modules, so the others are complete by now.
    """
    require(interface, "create_top", "create_export_tab", "Engine")
    engine = interface.Engine.__init__.__globals__
    manager, runner, chatter = engine["Manager"], engine["Runner"], engine["WebChatModel"]
    require(manager, "get_base_elems")
    require(runner, "_parse_train_args", "_parse_eval_args", "_initialize")
    require(chatter, "load_model")
    _patch_panel(interface, manager)
    _patch_runner(runner)
    _patch_chatter(chatter)


def settings(manager: Any, data: dict[Any, Any]) -> dict[str, Any]:
    """LLaMA-Factory keys that the panel asks for; empty without use_kt.

    Raises:
        ValueError: the box of further settings holds no JSON object.
    """
    use, method, path, more = (data[manager.get_elem_by_id(f"top.{name}")] for name in _FIELDS)
    if not use:
        return {}
    try:
        values = json.loads(more or "{}")
    except (ValueError, RecursionError) as error:
        raise ValueError(f"KT settings: expected a JSON object, found {more!r} ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f'KT settings: expected a JSON object such as {{"cpu_infer": 8}}, found {more!r}')
    return {"use_kt": True, "kt_method": method, **({"kt_weight_path": path} if path else {}), **values}


def _patch_panel(interface: ModuleType, manager: type) -> None:
    import gradio

    stock_top, stock_export, stock_base = interface.create_top, interface.create_export_tab, manager.get_base_elems

    def create_top() -> dict[str, Any]:
        elements = stock_top()
        names = list(dict.fromkeys(METHODS.values()))
        with gradio.Accordion("kt_sft: routed experts in CPU kernels", open=True), gradio.Row():
            boxes = (
                gradio.Checkbox(True, label="use_kt", info="Run the experts of MoE models in kt_sft.", scale=1),
                gradio.Dropdown(names, value=names[0], label="kt_method", info="Format of the experts.", scale=1),
                gradio.Textbox("", label="kt_weight_path", info="Container or GGUF; empty: the model's own.", scale=2),
                gradio.Textbox("{}", label="KT settings", info="More kt_... keys, a JSON object.", scale=2),
            )
        return {**elements, **dict(zip(_FIELDS, boxes, strict=True))}

    def create_export_tab(engine: Any) -> dict[str, Any]:
        elements = stock_export(engine)
        if elements["extra_args"].value == "{}":
            elements["extra_args"].value = '{"use_kt": true}'
        return elements

    def get_base_elems(self: Any) -> set[Any]:
        return stock_base(self) | {self.get_elem_by_id(f"top.{name}") for name in _FIELDS}

    interface.create_top, interface.create_export_tab = create_top, create_export_tab
    manager.get_base_elems = get_base_elems


def _patch_runner(runner: type) -> None:
    stock_check = runner._initialize

    def initialize(self: Any, data: dict[Any, Any], do_train: bool, from_preview: bool) -> str:
        fault = stock_check(self, data, do_train, from_preview)
        return fault or _fault(self.manager, data)

    def with_settings(stock: Any) -> Any:
        def parse(self: Any, data: dict[Any, Any]) -> dict[str, Any]:
            ours, values = settings(self.manager, data), stock(self, data)
            if ours and not torch.accelerator.is_available():
                ours.setdefault("use_cpu", True)  # bf16 without an accelerator needs it, and the page has no box for it
            return {**values, **ours}

        return parse

    runner._initialize = initialize
    for name in ("_parse_train_args", "_parse_eval_args"):
        setattr(runner, name, with_settings(getattr(runner, name)))


def _patch_chatter(chatter: type) -> None:
    stock_load = chatter.load_model

    def load_model(self: Any, data: dict[Any, Any]) -> Any:
        import gradio

        if fault := _fault(self.manager, data):
            gradio.Warning(fault)
            yield fault
            return
        box = self.manager.get_elem_by_id("infer.extra_args")
        try:
            extra = json.dumps({**settings(self.manager, data), **json.loads(data[box])})
        except (TypeError, ValueError, RecursionError):
            extra = data[box]  # the stock code says what is wrong with it
        try:
            yield from stock_load(self, {**data, box: extra})
        except Exception as error:  # the page would show nothing but "Error"
            self.engine = None
            yield f"{type(error).__name__}: {error}"

    chatter.load_model = load_model


def _fault(manager: Any, data: dict[Any, Any]) -> str:
    try:
        settings(manager, data)
    except ValueError as error:
        return str(error)
    return ""
