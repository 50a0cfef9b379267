"""A canary in training: after the first optimiser step, everything that was asked to train has changed and matters.

An adapter that a fault keeps out of the computation trains for weeks without a word: its loss is that of the base
model. The check needs one step. It watches which modules, and which experts of a layer, get a gradient at their output;
each of them has to have a gradient in its factors and other values after the step. Then a short forward pass with each
module's adapter on and off has to differ.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback

from kt_sft import env
from kt_sft.errors import InertAdapter
from kt_sft.integrations.canary.parts import Part, find_parts, resting_parameters
from kt_sft.integrations.canary.probe import Comparison, amplified, expert_ids, switched_off, undisturbed
from kt_sft.integrations.peft.injecting import has_experts
from kt_sft.models.spec import iter_routed_experts

logger = logging.getLogger(__name__)

PROBE_TOKENS = 64
MAX_IDLE_STEPS = 10  # in which every gradient is zero, before that counts as a fault
_SMALLEST_GRADIENT = 1e-20  # of an output: below it, those of the factors may round to zero


class Canary(TrainerCallback):
    """Stops a run whose adapter does not train, after the first optimiser step with a learning rate above zero.

    For any trainer of transformers: `Trainer(..., callbacks=[kt_sft.Canary()])`; LLaMA-Factory's runs with use_kt have
    it. Losses and results are those of a run without it. On models without our experts it does nothing.
    """

    def __init__(self) -> None:
        self.is_done = False
        self._watch: _Watch | None = None
        self._idle_steps = 0

    def on_step_begin(self, args: Any, state: Any, control: Any, model=None, optimizer=None, **kwargs: Any) -> None:
        """Start to watch, unless this step is one of warm-up with rate zero."""
        if self.is_done or self._watch is not None or model is None or optimizer is None:
            return
        if not has_experts(model) or not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
            self.is_done = True
        elif any(group["lr"] > 0 for group in optimizer.param_groups):
            self._watch = _Watch(model, optimizer)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the gradients before the optimiser spends them; DeepSpeed has: then only the values tell."""
        if self._watch is not None and not getattr(args, "deepspeed", None):
            self._watch.look_at_gradients()

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer=None, **kwargs: Any) -> None:
        """Compare.

        Raises:
            InertAdapter: names the first module that was asked for and does not train.
        """
        if self._watch is None:
            return
        watch, self._watch = self._watch, None
        watch.close()
        if getattr(optimizer, "step_was_skipped", False):
            return  # a loss scale was too high: the next step
        self._idle_steps += 1
        if watch.is_idle() and self._idle_steps < MAX_IDLE_STEPS:
            return  # such as a batch without labels: the next step
        self.is_done = True
        watch.check(state.global_step)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """A run may end within a step."""
        if self._watch is not None:
            self._watch.close()
            self._watch = None


@dataclass
class _Seen:
    """Of one module in the step: whether it was called, and where its output had a gradient that is not zero."""

    was_called: bool = False
    was_reached: bool = False  # by a gradient, which may be zero
    experts: Tensor | None = None  # bool [experts]
    has_gradient: bool = False


class _Watch:
    """One step of a model, from its first forward pass to the end of the optimiser's work."""

    def __init__(self, model: nn.Module, optimizer: Any):
        self.model = model
        self.ids: Tensor | None = None
        self.parts = list(find_parts(model, resting_parameters(optimizer)))
        self._stepped = {id(p) for group in optimizer.param_groups for p in group["params"]}
        for part in self.parts:
            part.before = part.sums()
        self.seen = {id(part.module): _Seen() for part in self.parts}
        experts = {id(module): module for _, module in iter_routed_experts(model)}
        self._handles = [model.register_forward_pre_hook(self._keep_ids, with_kwargs=True)]
        for key, module in {id(part.module): part.module for part in self.parts}.items():
            if key in experts:
                self.seen[key].experts = torch.zeros(module.num_experts, dtype=torch.bool)
            self._handles.append(module.register_forward_hook(self._listen, with_kwargs=True))

    def close(self) -> None:
        """Take the hooks away."""
        for handle in self._handles:
            handle.remove()

    def look_at_gradients(self) -> None:
        """Which parameters have one; where none is left, nothing is known."""
        if any(p.grad is not None for part in self.parts for p in part.parameters):
            for part in self.parts:
                part.look_at_gradient()

    def is_idle(self) -> bool:
        """Whether gradients came, and all were zero."""
        seen = self.seen.values()
        expected = [s.has_gradient if s.experts is None else bool(s.experts.any()) for s in seen]
        return any(s.was_reached for s in seen) and not any(expected)

    def check(self, step: int) -> None:
        """Raises InertAdapter, or says what was excepted.

        A gradient of zeros may be right: queries and keys have no other where a token sees itself alone.
        """
        is_idle = self.is_idle()
        updated: dict[str, Tensor] = {}
        resting, rounded, experts_resting, num_experts = [], [], 0, 0
        for part in self.parts:
            seen, changed = self.seen[id(part.module)], part.is_changed()
            trains = changed if part.has_gradient is None else changed & part.has_gradient
            expected = seen.experts if seen.experts is not None else torch.tensor([seen.has_gradient])
            updated[part.name] = trains
            is_cut_off = seen.was_called and not seen.was_reached
            if (is_cut_off or is_idle) and not part.may_rest:
                raise _inert(step, part.name, "no gradient reaches its output")
            if part.may_rest or not expected.any():
                resting += [] if trains.any() else [part.name]
            elif (expected & ~changed).all() and self._may_round(part):
                rounded.append(part.name)
            elif (expected & ~trains).any():
                which = (expected & ~trains).nonzero().flatten().tolist()
                where = f" in experts {', '.join(map(str, which[:8]))} of {len(trains)}" if part.factors else ""
                no_gradient = part.has_gradient is not None and not part.has_gradient[which[0]]
                why = "its parameters have no gradient" if no_gradient else "the optimiser left its parameters alone"
                raise _inert(step, part.name, f"its output has a gradient, {why}{where}")
            if part.factors:
                num_experts += len(trains)
                experts_resting += int((~trains).sum())
        with undisturbed(self.model):
            self._check_matters(step, updated)
        if env.local_rank() == 0:
            excepted = [f"{experts_resting} of {num_experts} matrices of experts without tokens"] * bool(
                experts_resting
            )
            excepted += [f"without input or gradient: {_first(resting)}"] * bool(resting)
            excepted += [f"steps too small for 16 bits: {_first(rounded)}"] * bool(rounded)
            logger.warning(
                "canary: step %d changed all %d modules that train%s",
                step,
                len(self.parts) - len(resting) - len(rounded),
                f"; excepted {'; '.join(excepted)}" if excepted else "",
            )

    def _may_round(self, part: Part) -> bool:
        """Whether the optimiser has a gradient for it, whose step is lost in its rounding: a warm-up begins so."""
        has_gradient = part.has_gradient is not None and bool(part.has_gradient.any())
        is_short = all(p.element_size() <= 2 and id(p) in self._stepped for p in part.parameters)
        return has_gradient and is_short and not part.factors

    def _check_matters(self, step: int, updated: dict[str, Tensor]) -> None:
        """Whether the output of each module, and of the model, is another one with the adapters off."""
        if self.ids is None:
            return
        comparison = Comparison(updated, {id(p.module): p.name for p in self.parts})
        layers = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
        with comparison.of_each(self.model):
            on = self._logits()
        if comparison.inert:
            raise _inert(step, comparison.inert[0], "its output is the same with the adapter switched off")
        with switched_off(layers):
            off = self._logits()
        if torch.equal(on, off):
            with amplified(layers):
                on = self._logits()
            if torch.equal(on, off):
                raise _inert(step, self.parts[0].name, "the model's output is the same with the adapter switched off")

    def _logits(self) -> Tensor:
        out = self.model(input_ids=self.ids, use_cache=False)
        return tree_leaves(out.logits if hasattr(out, "logits") else out)[0]

    def _keep_ids(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        if self.ids is None and isinstance(ids, Tensor) and ids.dim() == 2:
            self.ids = _text_only(ids[:1, :PROBE_TOKENS].detach().clone(), self.model.config)

    def _listen(self, module: nn.Module, args: tuple, kwargs: dict[str, Any], output: Any) -> None:
        seen = self.seen[id(module)]
        seen.was_called = True
        ids = expert_ids(args, kwargs) if seen.experts is not None else None
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad:
                tensor.register_hook(partial(_note_gradient, seen, ids))


def _note_gradient(seen: _Seen, ids: Tensor | None, gradient: Tensor) -> None:
    seen.was_reached = True
    if seen.experts is None:
        seen.has_gradient |= bool(gradient.any())
        return
    rows = (gradient.abs() > _SMALLEST_GRADIENT).flatten(0, -2).any(-1)  # [tokens]
    used = ids.reshape(len(rows), -1)[rows].unique().cpu()
    seen.experts[used[used < len(seen.experts)]] = True  # a larger one says: no expert


def _first(names: list[str], count: int = 4) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(names[:count]) + more


def _text_only(ids: Tensor, config: Any) -> Tensor:
    """Token ids without the placeholders of images and the like, which would need these."""
    for name in ("image_token_id", "image_token_index", "video_token_id", "audio_token_id", "vision_start_token_id"):
        token = getattr(config, name, None)
        if isinstance(token, int):
            ids[ids == token] = 0
    return ids


def _inert(step: int, name: str, why: str) -> InertAdapter:
    return InertAdapter(
        f"canary: step {step}: {name} was asked for and does not train: {why}; the run would end with an adapter that "
        "is none: see what froze, detached or replaced it, or leave it out of the target"
    )
