"""Deferred experts: of each token the d least weighted experts of a layer, computed while the model goes on.

Their weighted output is added to that of the next MoE layer, so the model does not wait for them. The last MoE layer
defers nothing. With d = 0 nothing changes; with more, results are approximate (docs/operator.md has the measured cost).
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kt_sft.schedule import task_queue
from kt_sft.schedule.task_queue import Result


@dataclass(frozen=True)
class Parts:
    """A layer's work on one input, in parts that the worker runs.

    Args:
        slots: waits for the inputs and gives the ids int64 `[tokens, k]`; `skip` or larger is not computed here.
        weights: router weights f32 `[tokens, k]`, there after `slots`.
        compute: fills bf16 or f32 `[tokens, hidden]` with the weighted sum of the experts that the ids name.
        finish: called when nothing reads the inputs any more.
    """

    slots: Callable[[], Tensor]
    weights: Tensor
    skip: int
    compute: Callable[[Tensor, Tensor], None]
    finish: Callable[[], None]


def split_deferred(ids: Tensor, weights: Tensor, count: int, skip: int) -> tuple[Tensor, Tensor]:
    """Ids that are computed now, and ids that are deferred; in both `skip` stands where the other one has the expert.

    Args:
        ids: int64 `[tokens, k]`, `skip` or larger for slots that are not computed here.
        weights: router weights `[tokens, k]`.
        count: of a token's experts so many are deferred, those with the lowest weights (all, if it has no more); of
            equal weights the later slot.
    """
    is_here = ids < skip  # [tokens, k]
    order = weights.masked_fill(~is_here, torch.inf).flip(1).argsort(dim=1, stable=True)[:, :count]
    lowest = torch.zeros_like(is_here).scatter_(1, order, True).flip(1)
    is_deferred = lowest & is_here
    return ids.masked_fill(is_deferred, skip), ids.masked_fill(~is_deferred, skip)


class LayerChain:
    """The MoE layers of one model in their order, and what is on its way from one to the next.

    A thread runs one forward pass at a time. Each layer takes what is there, whoever it is for: output that is not for
    this layer, or for another number of tokens, is left over from a pass that did not end, and is dropped.
    """

    def __init__(self) -> None:
        self._layers: list[weakref.ref] = []
        self._on_its_way = threading.local()

    def append(self, layer: Deferral) -> None:
        """Add the next layer; the chain does not keep it alive."""
        self._layers.append(weakref.ref(layer))

    @property
    def last(self) -> Deferral | None:
        """The last layer that is still alive."""
        return next((layer for ref in reversed(self._layers) if (layer := ref()) is not None), None)

    def after(self, layer: Deferral) -> Deferral | None:
        """The layer that follows; None for the last one."""
        alive = [known for ref in self._layers if (known := ref()) is not None]
        position = next(index for index, known in enumerate(alive) if known is layer)
        return alive[position + 1] if position + 1 < len(alive) else None

    def take(self, layer: Deferral, tokens: int) -> Result | None:
        """Output that the layer before deferred in this pass, f32 `[tokens, hidden]`."""
        found = getattr(self._on_its_way, "found", None)
        self._on_its_way.found = None
        if found is None or found[0]() is not layer or found[1] != tokens:
            return None
        return found[2]

    def leave(self, layer: Deferral, tokens: int, output: Result) -> None:
        """Leave deferred output for `layer`."""
        self._on_its_way.found = (weakref.ref(layer), tokens, output)


class Deferral:
    """How one layer, the next of its chain, defers.

    Args:
        per_token: so many experts of a token; 0 computes all at once, but still adds what the layer before deferred.
    """

    def __init__(self, chain: LayerChain, per_token: int):
        self.chain = chain
        self.per_token = per_token
        chain.append(self)

    def start(self, parts: Parts, out: Tensor, *, run: Callable[[Callable[[], Tensor]], Result]) -> Result:
        """Begin a layer's work: its result is `out`, filled.

        Args:
            parts: its `compute` is called once, or twice with different ids.
            out: bf16 or f32 `[tokens, hidden]` on the CPU. Filled by `compute` itself where nothing is added.
            run: `task_queue.submit`, or `task_queue.run_now` for what is not deferred.
        """
        tokens, hidden = out.shape
        before = self.chain.take(self, tokens)
        follower = self.chain.after(self) if self.per_token > 0 and tokens > 0 else None
        kept: list[Tensor] = []

        @torch.inference_mode()  # the caller's tensors may be such that only this mode may write
        def work() -> Tensor:
            try:
                ids = parts.slots()
                if follower is not None:
                    ids, later = split_deferred(ids, parts.weights, self.per_token, parts.skip)
                    kept.append(later)
                if before is None:
                    parts.compute(ids, out)
                    return out
                total = torch.empty((tokens, hidden), dtype=torch.float32, device="cpu")
                parts.compute(ids, total)
                total += before.result()
                return out.copy_(total)
            finally:
                if follower is None:
                    parts.finish()

        now = run(work)
        if follower is not None:

            @torch.inference_mode()
            def rest() -> Tensor:
                try:
                    now.result()  # nothing can be added to a pass that failed
                    total = torch.empty((tokens, hidden), dtype=torch.float32, device="cpu")
                    parts.compute(kept[0], total)
                    return total
                finally:
                    parts.finish()

            self.chain.leave(follower, tokens, task_queue.submit(rest))
        return now
