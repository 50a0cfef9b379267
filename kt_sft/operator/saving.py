"""`cpu_save`: layers that were packed from tensors become a container that `load_weights` takes."""

from __future__ import annotations

from pathlib import Path

from kt_sft.config import KTConfig
from kt_sft.convert.plan import AppendPlan
from kt_sft.convert.run import append_layer
from kt_sft.operator.weights import LayerSizes
from kt_sft.sources.tensors import TensorExperts


def save_layer(source: TensorExperts, sizes: LayerSizes, config: KTConfig) -> None:
    """Add the layer, all experts in the order of the tensors, to the container at `config.weight_path`.

    Raises:
        ConfigError: a container of another format, or one of a checkpoint, is there.
        OutputError: it cannot be written.
    """
    group = config.int4_group_size if config.format == "int4" else 0
    name = f"model.layers.{sizes.layer_idx}.mlp.experts"
    plan = AppendPlan(Path(config.weight_path or ""), config.format, group, name, source.spec, sizes.layer_idx)
    append_layer(source, plan)
