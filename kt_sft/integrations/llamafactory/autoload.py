"""The way in: runs at `import torch` and, with USE_KT=1, patches LLaMA-Factory's modules as they are imported.

Target of the `torch.backends` entry point, so it runs in `llamafactory-cli`, in torchrun and in its workers alike.
Standard library only, and it never raises: an exception here would make `import torch` fail in every program of the
environment. The patches live in the modules that PATCHES names.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import logging
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

SUPPORTED = "0.9.5"  # the LLaMA-Factory release whose patch points hook.py knows
ENTRY_POINT_GROUP, ENTRY_POINT_NAME = "torch.backends", "kt_sft"
PATCHES = {  # LLaMA-Factory module -> module beside this one, and its function that patches it
    "llamafactory.hparams.parser": ("hook", "patch_parser"),
    "llamafactory.model.adapter": ("hook", "patch_adapter"),
    "llamafactory.model.loader": ("hook", "patch_loader"),
    "llamafactory.data.loader": ("data_checks", "patch_loader"),
    "llamafactory.data.template": ("data_checks", "patch_template"),
    "llamafactory.model.patcher": ("attention", "patch_patcher"),
    "llamafactory.launcher": ("interrupts", "patch_launcher"),
    "llamafactory.webui.interface": ("webui", "patch_interface"),
}
OPTIONAL = (
    "llamafactory.launcher",
    "llamafactory.webui.interface",
)  # imported by some commands only

_OFF = ("0", "false", "f", "no", "n", "off")  # words for USE_KT that ask for nothing

logger = logging.getLogger(__name__)
_patched: list[str] = []
_failed: dict[str, str] = {}  # module (or "autoload") -> reason


class PatchFinder:
    """Finds nothing itself: lets the other finders find a module of `PATCHES` and patches it right after it has run."""

    def __init__(self) -> None:
        # Such a module is half-way through its own `import torch`; it is patched at a later import, when complete.
        self.half_imported = {name for name in PATCHES if name in sys.modules}

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        if self.half_imported:
            self._patch_completed()
        if fullname not in PATCHES:
            return None
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find is not None else None
            if spec is not None:
                _patch_after_exec(spec)
                return spec
        return None

    def _patch_completed(self) -> None:
        for name in list(self.half_imported):
            module = sys.modules.get(name)
            if module is not None and not getattr(module.__spec__, "_initializing", False):
                self.half_imported.discard(name)
                _apply(module)


def autoload() -> None:
    """Install the finder if USE_KT asks for it; the reason of a failure is kept for `kt-sft doctor`."""
    try:
        from kt_sft import env

        word = env.read("USE_KT")
        if env.use_kt():
            install()
        elif word is not None and word.lower() not in _OFF:
            logger.warning("kt_sft: USE_KT=%s: expected 1, true, y or 0; LLaMA-Factory runs without kt_sft", word)
    except Exception as error:
        _fail("autoload", error)


def install() -> None:
    """Install the finder, once."""
    if not any(isinstance(finder, PatchFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, PatchFinder())


def failures() -> dict[str, str]:
    """Patch points that could not be patched in this process, with the reason."""
    return dict(_failed)


def require(owner: Any, *names: str) -> None:
    """What a patch replaces is there.

    Raises:
        RuntimeError: `owner`, a module or class, lacks one of `names`.
    """
    if missing := [name for name in names if not hasattr(owner, name)]:
        raise RuntimeError(f"no {', '.join(missing)} in {owner.__name__}; kt_sft knows LLaMA-Factory {SUPPORTED}")


def status() -> dict[str, Any]:
    """Whether LLaMA-Factory runs of this environment are taken over by kt_sft; if not, why and what to do.

    Returns:
        `active` (bool), `reason` and `remedy` (empty when active), then the facts: `use_kt`, `torch_autoload`,
        `entry_point` (bools), `llamafactory` (installed version or None), `patched` and `failed` (of this process).
    """
    facts: dict[str, Any] = {"patched": list(_patched), "failed": failures()}
    try:
        from kt_sft import env
        from kt_sft.compat.releases import release_of

        facts["use_kt"] = env.use_kt()
        facts["torch_autoload"] = env.device_autoload()
        entry_points = importlib.metadata.entry_points(group=ENTRY_POINT_GROUP)
        facts["entry_point"] = any(point.name == ENTRY_POINT_NAME for point in entry_points)
        facts["llamafactory"] = release_of("llamafactory")
        reason, remedy = _why_inactive(facts)
    except Exception as error:
        reason, remedy = f"the check itself failed: {error}", "reinstall kt_sft: pip install ."
    return {"active": not reason, "reason": reason, "remedy": remedy, **facts}


def _why_inactive(facts: dict[str, Any]) -> tuple[str, str]:
    version = facts["llamafactory"]
    install = f"pip install llamafactory=={SUPPORTED}"
    if version is None:
        return "LLaMA-Factory is not installed", install
    if not facts["entry_point"]:
        return f"the `{ENTRY_POINT_GROUP}` entry point of kt_sft is not installed", "pip install . (or make setup)"
    if not facts["torch_autoload"]:
        return "TORCH_DEVICE_BACKEND_AUTOLOAD is not 1: torch loads no entry points", "unset it"
    if facts["failed"]:
        return "; ".join(f"{name}: {why}" for name, why in facts["failed"].items()), install
    if version != SUPPORTED:
        return f"LLaMA-Factory {version} is installed, supported is {SUPPORTED}", install
    if not facts["use_kt"]:
        return "USE_KT is not set to 1", "start LLaMA-Factory as USE_KT=1 llamafactory-cli ..."
    return "", ""


def _patch_after_exec(spec: ModuleSpec) -> None:
    """Shadow exec_module on the loader object of this one module; its type stays, which inspect and pkgutil rely on."""
    try:
        run = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            run(module)
            _apply(module)

        spec.loader.exec_module = exec_module
    except Exception as error:
        _fail(spec.name, error)


def _apply(module: ModuleType) -> None:
    name = module.__name__
    if name not in PATCHES or name in _patched:
        return
    try:
        room, patch = PATCHES[name]
        getattr(importlib.import_module(f"{__package__}.{room}"), patch)(module)
        _patched.append(name)
    except Exception as error:
        _fail(name, error)


def _fail(name: str, error: Exception) -> None:
    reason = f"{type(error).__name__}: {error}"
    if not _failed:
        logger.warning("kt_sft is not active in LLaMA-Factory: %s: %s; run `kt-sft doctor`", name, reason)
    _failed[name] = reason
