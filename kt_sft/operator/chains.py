"""Which operators are the layers of one model, in what order."""

from __future__ import annotations

import threading
from collections.abc import Hashable

from kt_sft.schedule.deferred import LayerChain

_lock = threading.Lock()
_newest: dict[Hashable, tuple[LayerChain, int]] = {}  # with the number of the last layer


def join_chain(layer: object, layer_idx: int, model: Hashable) -> LayerChain:
    """The chain that a new layer is now the last one of.

    Args:
        model: what layers of one model have in common.
    """
    with _lock:
        chain, last_idx = _newest.get(model, (LayerChain(), -1))
        if chain.last is None or layer_idx <= last_idx:
            chain = LayerChain()
        chain.append(layer)
        _newest[model] = (chain, layer_idx)
        return chain
