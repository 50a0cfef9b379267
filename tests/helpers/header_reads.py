"""Counts how often our code opens the files of a model to read what they say of themselves, and makes what follows."""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from unittest import mock

from kt_sft import runtime
from kt_sft.integrations.transformers import opened

ROOT = Path(__file__).resolve().parents[2]
_OURS = f"{ROOT / 'kt_sft'}{os.sep}"
_LIBRARIES = f"{os.sep}site-packages{os.sep}"
# Functions that open a file for its data, or for all of its bytes.
_DATA = {"blocks", "blobs", "hash_source"}
_counting: list[tuple[Path, Counter[str]]] = []


def _reader(frame: FrameType | None) -> str | None:
    """The function of ours that opens a file; None: a library does, or it is opened for its data."""
    names: list[str] = []
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(_OURS):
            names.append(frame.f_code.co_name)
        elif not names and (_LIBRARIES in path or "tests" in Path(path).parts):
            return None
        frame = frame.f_back
    return names[0] if names and not _DATA & set(names) else None


def _hook(event: str, arguments: tuple) -> None:
    if event != "open" or not _counting or not isinstance(arguments[0], str | os.PathLike):
        return
    path = Path(arguments[0])
    for folder, counts in _counting:
        if path.is_relative_to(folder) and path.is_file() and _reader(sys._getframe(1)):
            counts[path.relative_to(folder).as_posix()] += 1


sys.addaudithook(_hook)  # for good: Python has no way to take one off


@contextmanager
def counted(folder: Path) -> Iterator[Counter[str]]:
    """Within it: opened files below a folder by name; `meta models`, models that we build without weights;
    `preparations` of the native library.
    """
    counts: Counter[str] = Counter()

    def counting(name: str, stock):
        def call(*args, **kwargs):
            counts[name] += 1
            return stock(*args, **kwargs)

        return call

    _counting.append((folder, counts))
    ours = [module for name, module in list(sys.modules.items()) if name.startswith("kt_sft.")]
    places = [module for module in ours if "prepare_native" in vars(module)]
    with mock.patch.object(opened, "meta_model", counting("meta models", opened.meta_model)):
        prepare = counting("preparations", runtime.prepare_native)
        patches = [mock.patch.object(module, "prepare_native", prepare) for module in places]
        for patch in patches:
            patch.start()
        try:
            yield counts
        finally:
            for patch in patches:
                patch.stop()
            _counting.pop()
