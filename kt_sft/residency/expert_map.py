"""Which experts of a layer the operator computes, and under which number the native layer has them."""

from __future__ import annotations

import torch
from torch import Tensor

from kt_sft.errors import ConfigError
from kt_sft.storage import check_storage


class ExpertMap:
    """The experts that are not on a GPU.

    Args:
        num_experts: of the layer.
        num_gpu_experts: so many of the first are on a GPU.
        gpu_experts_mask: bool `[num_experts]`, instead of a number.
    Raises:
        ConfigError: both, or one that does not fit.
    """

    def __init__(self, num_experts: int, num_gpu_experts: int, gpu_experts_mask: Tensor | None):
        if gpu_experts_mask is not None and num_gpu_experts:
            raise ConfigError("num_gpu_experts and gpu_experts_mask are both set; leave one of them out")
        if type(num_gpu_experts) is not int or not 0 <= num_gpu_experts <= num_experts:
            raise ConfigError(f"num_gpu_experts: expected 0 to {num_experts}, found {num_gpu_experts!r}")
        if gpu_experts_mask is None:
            mask = torch.arange(num_experts, device="cpu") < num_gpu_experts
        else:
            mask = _as_tensor(gpu_experts_mask, "gpu_experts_mask")
            if mask is None:
                raise ConfigError(f"gpu_experts_mask: expected bool [{num_experts}], found {gpu_experts_mask!r}")
            if mask.dtype is not torch.bool or mask.shape != (num_experts,):
                raise ConfigError(
                    f"gpu_experts_mask: expected bool [{num_experts}], found {mask.dtype} {list(mask.shape)}"
                )
        self.num_experts = num_experts
        self.on_cpu: list[int] = torch.nonzero(~mask).flatten().tolist()
        # By id; the last entry, which -1 finds too, is that of slots to skip.
        self._slots = torch.full((num_experts + 1,), len(self.on_cpu), dtype=torch.int64, device="cpu")
        self._slots[self.on_cpu] = torch.arange(len(self.on_cpu), device="cpu")

    def slots(self, topk_ids: Tensor) -> Tensor:
        """Numbers in the native layer; for -1 and for experts on a GPU the number of its experts, which it skips.

        Args:
            topk_ids: int64 `[tokens, k]` on the CPU.
        Raises:
            ValueError: an id that is neither -1 nor an expert.
        """
        if topk_ids.numel() == 0:
            return topk_ids
        lowest, highest = (value.item() for value in torch.aminmax(topk_ids))
        if lowest < -1 or highest >= self.num_experts:
            wrong = lowest if lowest < -1 else highest
            raise ValueError(
                f"topk_ids: expected -1 or 0 to {self.num_experts - 1}, found {wrong}; pass the ids of the physical "
                "experts as the router chose them"
            )
        return self._slots.take(topk_ids)


def _as_tensor(values: object, name: str) -> Tensor | None:
    """On the CPU; None of what is no array of numbers.

    Raises:
        ValueError: names a tensor whose memory is gone.
    """
    if isinstance(values, Tensor):
        check_storage(values, name)
    try:
        return torch.as_tensor(values).detach().to("cpu")
    except (TypeError, ValueError, RuntimeError):
        return None


def logical_experts(physical_to_logical_map: Tensor | None, num_experts: int, available: int) -> list[int]:
    """The expert of the checkpoint that each physical expert is a copy of.

    Args:
        physical_to_logical_map: integers `[num_experts]`; None: each is its own.
        available: experts of the checkpoint or of the tensors.
    Raises:
        ValueError: wrong length, or an expert that is not there.
    """
    if physical_to_logical_map is None:
        if available != num_experts:
            raise ValueError(
                f"weights: expected {num_experts} experts, found {available}; pass physical_to_logical_map if experts "
                "are there more than once"
            )
        return list(range(num_experts))
    given = _as_tensor(physical_to_logical_map, "physical_to_logical_map")
    if given is None:
        raise ValueError(
            f"physical_to_logical_map: expected integers [{num_experts}], found {physical_to_logical_map!r}"
        )
    values = given.tolist()
    if not isinstance(values, list) or len(values) != num_experts:
        found = len(values) if isinstance(values, list) else "a number"
        raise ValueError(f"physical_to_logical_map: expected {num_experts} entries, found {found}")
    wrong = [value for value in values if type(value) is not int or not 0 <= value < available]
    if wrong:
        raise ValueError(f"physical_to_logical_map: expected whole numbers 0 to {available - 1}, found {wrong[0]}")
    return values
