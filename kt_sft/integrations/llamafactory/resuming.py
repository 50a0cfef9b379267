"""Going on from a checkpoint: which one, whether it fits the run, and what the run and it say differently."""

from __future__ import annotations

import copy
import logging
import math
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import Trainer

from kt_sft import env
from kt_sft.adapters.folder import adapter_file
from kt_sft.adapters.tensor_file import TensorFile
from kt_sft.errors import ConfigError, FormatError, KTError
from kt_sft.formats import training_checkpoint
from kt_sft.formats.training_checkpoint import OPTIMIZER_NAME, SCHEDULER_NAME
from kt_sft.integrations.llamafactory import adapters, saving
from kt_sft.integrations.peft import reloading
from kt_sft.integrations.peft.adapter_dir import in_running_form, read_adapter_config

logger = logging.getLogger(__name__)

KEY = "resume_from_checkpoint"
_YES, _NO = ("true", "yes"), ("false", "no")  # words of the command line; a YAML file has booleans
# Optimizers of LLaMA-Factory that hold fewer parameters, or states of other shapes.
_OWN_OPTIMIZERS = ("use_galore", "use_apollo", "use_badam", "use_muon", "use_adam_mini")
_STATES = ("exp_avg", "exp_avg_sq", "momentum_buffer")  # as large as their parameter
_FROM_WEIGHTS = "adapter_name_or_path starts from its weights with a new optimizer"


@dataclass(frozen=True)
class RunAdapter:
    """The adapter that a run is about to train: PEFT's config, and shapes by the names in its file."""

    config: LoraConfig
    shapes: dict[str, tuple[int, ...]]

    @property
    def numel(self) -> int:
        """Trained elements."""
        return sum(math.prod(shape) for shape in self.shapes.values())


@dataclass(frozen=True)
class OptimizerState:
    """What a checkpoint's optimizer.pt says without its values.

    Args:
        num_parameters: trained by it.
        shapes: of the states that are as large as their parameter, by the parameter's place.
        groups: the settings of each parameter group.
    """

    num_parameters: int
    shapes: dict[int, tuple[int, ...]]
    groups: list[dict[str, Any]]


def find_checkpoint(training_args: Any) -> Path | None:
    """The checkpoint from which the run will go on, by the rules of LLaMA-Factory; None: from the start.

    `resume_from_checkpoint: true` becomes the path of the newest whole one.

    Raises:
        ConfigError: true, and there is no whole checkpoint.
        FormatError: the one that is named is missing, or not whole.
    """
    output, value = Path(training_args.output_dir), training_args.resume_from_checkpoint
    saving.clean(output, removes=env.local_rank() == 0)
    if isinstance(value, str) and not Path(value).exists() and value.lower() in (*_YES, *_NO):
        value = training_args.resume_from_checkpoint = value.lower() in _YES
    if value is False:
        return None
    if value is None:
        starts_over = getattr(training_args, "overwrite_output_dir", False) or not output.is_dir()
        return None if starts_over else last_checkpoint(output)
    if value is True:
        found = last_checkpoint(output)
        if found is None:
            _, broken = training_checkpoint.newest_whole(output)
            there = "; ".join(f"{name}: {fault}" for name, fault in broken.items()) or "none"
            raise ConfigError(f"{KEY}: expected a whole checkpoint in {output}, found {there}; remove the key to start")
        training_args.resume_from_checkpoint = str(found)
        return found
    return _named(Path(value))


def last_checkpoint(folder: str | Path, *, says: bool = True) -> Path | None:
    """The newest whole checkpoint of a run.

    Args:
        says: name those above it, which are not, in a warning.
    """
    found, broken = training_checkpoint.newest_whole(Path(folder))
    if broken and says:
        faults = ", ".join(f"{name} ({fault})" for name, fault in broken.items())
        instead = f"{found.name} is the newest whole one" if found else "there is no whole one, the run starts over"
        _say(f"{folder}: not whole, left by a run that was killed: {faults}; {instead}")
    return found


def run_adapter(model: nn.Module, model_args: Any, finetuning_args: Any) -> RunAdapter | None:
    """What LLaMA-Factory will train, found on a model without weights; None: not known before loading.

    A new adapter is built by LLaMA-Factory's own code.

    Args:
        model: of `check_model`; carries the adapter afterwards.
    Raises:
        KTError: a LoRA target that kt_sft refuses, by the names of LLaMA-Factory's keys.
    """
    sources = model_args.adapter_name_or_path or []
    source = Path(sources[-1]) / (model_args.adapter_folder or "") if sources else None
    goes_on = source is not None and not finetuning_args.create_new_adapter
    if goes_on and not source.exists():
        return None  # on the hub
    try:
        with _silence(), adapters.under_keys():
            if goes_on:
                built = reloading.untrained_twin(model, adapter_file(source))
            else:
                built = _new_adapter(model, model_args, finetuning_args)
        return RunAdapter(built.peft_config["default"], reloading.adapter_shapes(built))
    except KTError:
        raise
    except Exception as error:  # LLaMA-Factory reports it when it gets there
        logger.info("kt_sft: the adapter could not be built before loading (%s)", error)
        return None


def _new_adapter(model: nn.Module, model_args: Any, finetuning_args: Any) -> nn.Module:
    from llamafactory.model.adapter import init_adapter

    alone = copy.copy(model_args)
    alone.adapter_name_or_path = None
    with torch.device("meta"):
        return init_adapter(model.config, model, alone, copy.copy(finetuning_args), True)


def check(checkpoint: Path, bare: nn.Module, run: RunAdapter | None, training_args: Any, finetuning_args: Any) -> None:
    """Compare a checkpoint with the run that goes on from it; reads headers, and no values of the optimizer.

    What differs without being wrong is said in one line.

    Args:
        bare: the model without weights and without the run's adapter.
        run: None: not known yet, nor the size of the vocabulary; what loads the checkpoint looks again.
    Raises:
        KTError: the adapter is not one of this model, or other tensors than the run trains; or the optimizer's state
            is that of other tensors.
    """
    state = read_optimizer(checkpoint)
    with in_running_form(bare, checkpoint, may_grow=run is None) as folder:
        is_converted = folder != checkpoint
        if is_converted and training_checkpoint.is_deepspeed(checkpoint):
            raise FormatError(
                checkpoint, "adapter", expected="the form of this run, as in DeepSpeed's own files beside it",
                found="another form", remedy=_FROM_WEIGHTS,
            )  # fmt: skip
        saved = read_adapter_config(folder)
        if run is not None:
            reloading.check_same_tensors(checkpoint, folder, run.shapes, run.config)
    own = any(getattr(finetuning_args, name, False) for name in _OWN_OPTIMIZERS)
    if state is not None and not own:
        _check_kind(checkpoint, state, training_args)
    if state is not None and run is not None and not own:
        check_optimizer(checkpoint, state, list(run.shapes.values()), is_ordered=False)
        _check_layout(checkpoint, run) if is_converted else None
    if differences := list(_differences(checkpoint, saved, state, run, training_args)):
        _say(f"{KEY}: {checkpoint.name}: {'; '.join(differences)}")


def read_optimizer(checkpoint: Path) -> OptimizerState | None:
    """Counts, shapes and settings of a checkpoint's optimizer; None if there is none, or none that can be read so."""
    state = _read_torch(checkpoint / OPTIMIZER_NAME)
    groups, states = (state.get(key) for key in ("param_groups", "state")) if isinstance(state, dict) else (None, None)
    if not isinstance(groups, list) or not isinstance(states, dict) or not all(map(_is_group, groups)):
        return None
    shapes = {}
    for place, entry in states.items():
        tensor = next((entry[key] for key in _STATES if isinstance(entry, dict) and key in entry), None)
        if isinstance(place, int) and isinstance(tensor, torch.Tensor):
            shapes[place] = tuple(tensor.shape)
    settings = [{key: value for key, value in group.items() if key != "params"} for group in groups]
    return OptimizerState(sum(len(group["params"]) for group in groups), shapes, settings)


def _is_group(group: Any) -> bool:
    return isinstance(group, dict) and isinstance(group.get("params"), list)


def check_optimizer(
    checkpoint: Path, state: OptimizerState, shapes: list[tuple[int, ...]], *, is_ordered: bool
) -> None:
    """Whether an optimizer's state belongs to these parameters: torch itself compares their number only.

    Args:
        shapes: of the trained parameters.
        is_ordered: they are in the optimizer's order.
    Raises:
        FormatError: another number of parameters, or other shapes.
    """
    file = checkpoint / OPTIMIZER_NAME
    if state.num_parameters != len(shapes):
        raise FormatError(
            file, "optimizer state", expected=f"{len(shapes)} parameters", found=state.num_parameters,
            remedy=_FROM_WEIGHTS,
        )  # fmt: skip
    for place, shape in state.shapes.items() if is_ordered else ():
        if 0 <= place < len(shapes) and shapes[place] != shape:
            raise FormatError(
                file, f"optimizer state of parameter {place}", expected=list(shapes[place]), found=list(shape),
                remedy=_FROM_WEIGHTS,
            )  # fmt: skip
    if further := Counter(state.shapes.values()) - Counter(shapes):
        raise FormatError(
            file, "optimizer state", expected="the shapes of this run's LoRA factors",
            found=list(next(iter(further))), remedy=_FROM_WEIGHTS,
        )  # fmt: skip


def _check_kind(checkpoint: Path, state: OptimizerState, training_args: Any) -> None:
    """Whether a state is one of the run's kind of optimizer; it would take the state and fail in its first step."""
    try:
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(training_args)
        needed = set(kind([torch.nn.Parameter(torch.zeros(1))], **settings).param_groups[0]) - {"params"}
    except Exception as error:  # one that is not installed, or needs the model: transformers says so
        logger.info("kt_sft: the optimizer could not be built before loading (%s)", error)
        return
    lacking = sorted(needed.difference(*state.groups))
    if lacking:
        optim = getattr(training_args.optim, "value", training_args.optim)
        raise FormatError(
            checkpoint / OPTIMIZER_NAME, "optimizer state", expected=f"one of optim: {optim}",
            found=f"one of another optimizer, without {', '.join(lacking[:3])}",
            remedy=f"set the optim of the run that wrote it; {_FROM_WEIGHTS}",
        )  # fmt: skip


def _check_layout(checkpoint: Path, run: RunAdapter) -> None:
    """The optimizer's state fits the converted adapter by its shapes; make sure that it would not fit the other one."""
    tensors = TensorFile(checkpoint)
    shapes = Counter(tensors.shape(name) for name in tensors if ".lora_" in name)
    if shapes == Counter(shape for name, shape in run.shapes.items() if ".lora_" in name):
        raise FormatError(
            checkpoint, "optimizer state", expected="one of this release's layout of the LoRA factors",
            found="an adapter of another layout with the same shapes: it may be of either", remedy=_FROM_WEIGHTS,
        )  # fmt: skip


def _named(path: Path) -> Path:
    if not path.is_dir():
        raise FormatError(path, KEY, expected="a checkpoint-N directory", found="nothing", remedy="correct the path")
    if training_checkpoint.checkpoints(path):
        instead = last_checkpoint(path, says=False)
        raise FormatError(
            path, KEY, expected="a checkpoint-N directory", found="the directory of a run",
            remedy=f"resume from {instead}" if instead else _FROM_WEIGHTS,
        )  # fmt: skip
    if fault := training_checkpoint.find_fault(path):
        instead, _ = training_checkpoint.newest_whole(path.parent)
        remedy = f"resume from {instead}" if instead else _FROM_WEIGHTS
        raise FormatError(path, KEY, expected="a whole checkpoint", found=fault, remedy=remedy)
    return path


def _differences(
    checkpoint: Path, saved: LoraConfig, state: OptimizerState | None, run: RunAdapter | None, training_args: Any
) -> Iterator[str]:
    """Settings that checkpoint and run have differently, and which of both holds."""
    if run is not None:
        for key in ("lora_alpha", "use_rslora", "alpha_pattern"):
            before, now = getattr(saved, key), getattr(run.config, key)
            if before != now:
                yield f"{key} {before} there, {now} here is taken, which scales the same LoRA factors anew"
        before, now = (_dropout(config) for config in (saved, run.config))
        if before != now:
            yield f"lora_dropout {before} there, {now} here is taken"
    is_deepspeed = training_checkpoint.is_deepspeed(checkpoint)
    if not (checkpoint / OPTIMIZER_NAME).is_file() and not is_deepspeed:
        yield f"no {OPTIMIZER_NAME} in it: optimizer and learning rate schedule start afresh"
    elif (rates := _rates(checkpoint, state)) and not any(
        math.isclose(rate, training_args.learning_rate, rel_tol=1e-6) for rate in rates
    ):
        there = " and ".join(f"{rate:g}" for rate in sorted(set(rates)))
        yield f"learning_rate {training_args.learning_rate:g} here is ignored, {there} of its schedule goes on"
    decays = [group.get("weight_decay") or 0.0 for group in state.groups] if state else []
    if decays and not math.isclose(max(decays), training_args.weight_decay, rel_tol=1e-6):
        yield f"weight_decay {training_args.weight_decay:g} here is ignored, {max(decays):g} of its optimizer goes on"
    betas = [tuple(group["betas"]) for group in state.groups if "betas" in group] if state else []
    here = (training_args.adam_beta1, training_args.adam_beta2)
    if betas and here not in betas:
        yield f"adam_beta1 and adam_beta2 {here} here are ignored, {betas[0]} of its optimizer go on"
    done, most = training_checkpoint.step_of(checkpoint), training_args.max_steps
    if 0 < most <= (done or 0):
        yield f"step {done} there, max_steps {most} here: that run was at its end, and at most one more step is trained"
    ranks = training_checkpoint.num_ranks(checkpoint)
    if ranks is not None and ranks != training_args.world_size:
        processes = f"{ranks} process{'es' if ranks > 1 else ''}"
        yield (
            f"written by {processes}, this run has {training_args.world_size}: random states (dropout) start afresh, "
            "and a step covers another number of rows"
        )


def _rates(checkpoint: Path, state: OptimizerState | None) -> list[float]:
    scheduler = _read_torch(checkpoint / SCHEDULER_NAME)
    rates = scheduler.get("base_lrs") if isinstance(scheduler, dict) else None
    if not isinstance(rates, list) and state is not None:
        rates = [group.get("initial_lr", group.get("lr")) for group in state.groups]
    return [rate for rate in rates if isinstance(rate, float | int)] if isinstance(rates, list) else []


def _dropout(config: LoraConfig) -> float:
    return getattr(config, "adapter_dropout", None) or config.lora_dropout


def _read_torch(path: Path) -> Any:
    """A file of `torch.save` without running code of it, its tensors mapped; None: absent, damaged, or nothing but
    objects."""
    if not path.is_file():
        return None
    try:
        return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # of a damaged pickle torch raises whatever its opcodes lead to
        logger.info("%s: not read (%s)", path, type(error).__name__)
        return None


@contextmanager
def _silence() -> Iterator[None]:
    """What is built here is built again, and then said."""
    before = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        yield
    finally:
        logging.disable(before)


def trained_shapes(groups: Iterable[dict[str, Any]]) -> list[tuple[int, ...]]:
    """Shapes of an optimizer's parameters, in its order."""
    return [tuple(parameter.shape) for group in groups for parameter in group["params"]]


def _say(message: str) -> None:
    if env.local_rank() == 0:
        logger.warning("kt_sft: %s", message)
