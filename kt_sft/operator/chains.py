"""Which operators are the layers of one model, in what order."""

from __future__ import annotations

import threading
from collections.abc import Hashable

from kt_sft.schedule.deferred import Deferral, LayerChain

_lock = threading.Lock()
_newest: dict[Hashable, tuple[LayerChain, int]] = {}  # with the number of the last layer


def join_chain(layer_idx: int, model: Hashable, per_token: int) -> Deferral:
    """How a new layer defers: as the last one, now, of its model's chain.

    Args:
        model: what layers of one model have in common.
        per_token: experts of a token that are deferred.
    """
    with _lock:
        chain, last_idx = _newest.get(model, (LayerChain(), -1))
        if chain.last is None or layer_idx <= last_idx:
            chain = LayerChain()
        _newest[model] = (chain, layer_idx)
        return Deferral(chain, per_token)
