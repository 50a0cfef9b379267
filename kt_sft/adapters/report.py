"""What an adapter holds: for people before they hand it on, and for scripts as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_sft.adapters import gguf, peft_config
from kt_sft.adapters.folder import left_out
from kt_sft.adapters.forms import base_name, is_per_expert
from kt_sft.adapters.model import Adapter, Lora
from kt_sft.adapters.tensor_file import TensorFile
from kt_sft.formats.finite import is_finite
from kt_sft.formats.gguf import GgufIndex

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class Target:
    """All matrices of one name: `q_proj`, or `experts.gate`."""

    name: str
    matrices: int
    ranks: list[int]
    scales: list[float]
    mean_norm: float | None
    max_norm: float | None


@dataclass
class Report:
    """Norms are Frobenius norms of scale * b a."""

    path: str
    form: str
    base_model: str | None
    model_type: str | None = None
    peft_version: str | None = None
    tensors: int = 0
    size_bytes: int = 0
    dtypes: list[str] = field(default_factory=list)
    layers: int | None = None
    experts: int | None = None
    targets: list[Target] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)


def begin_report(source: Path) -> Report:
    """What the adapter's own files tell; every number is looked at for NaN and infinity.

    Raises:
        FormatError: damaged.
    """
    if source.is_file():
        index = GgufIndex.from_path(source)
        gguf.check_metadata(index)
        kinds = sorted({index.info(name).type.name for name in index})
        report = Report(str(source), "gguf", base_name(source), tensors=len(index), dtypes=kinds)
        report.size_bytes = source.stat().st_size
        report.problems += _not_finite((name, index.read(name)) for name in index)
        return report
    config = peft_config.read_config(source)
    tensors, experts = TensorFile(source), TensorFile.of_experts(source)
    files = [tensors] if experts is None else [tensors, experts]
    form = "ktransformers" if experts is not None else "per-expert" if is_per_expert(tensors) else "peft"
    report = Report(str(source), form, config.get("base_model_name_or_path"), tensors=sum(map(len, files)))
    report.peft_version = config.get("peft_version")
    report.dtypes = sorted(set().union(*(file.dtypes() for file in files)))
    report.size_bytes = sum(file.path.stat().st_size for file in files if file.path.is_file())
    report.model_type = peft_config.read_side_file(source).get("model_type")
    report.problems += _not_finite((name, file.read(name)) for file in files for name in file)
    report.notes += left_out(source)
    return report


def _not_finite(tensors: Iterator[tuple[str, Tensor]]) -> list[str]:
    import torch

    found = [name for name, tensor in tensors if not is_finite(tensor, torch.float32)]
    return [f"{len(found)} tensors with NaN or infinity, first {found[0]}"] if found else []


def complete_report(report: Report, adapter: Adapter) -> None:
    """Add what needs the model: form, targets, norms."""
    report.form, report.model_type = adapter.form, adapter.base.model_type
    report.base_model = report.base_model or adapter.base.path
    report.layers = len(adapter.experts)
    report.experts = max((adapter.base.specs[name].num_experts for name in adapter.experts), default=None)
    groups: dict[str, list[tuple[int, float, list[float]]]] = {}
    for module in adapter.experts:
        for projection, lora in adapter.read_experts(module).items():
            groups.setdefault(f"experts.{projection}", []).append((lora.rank, lora.scale, _norms(lora)))
    for name in adapter.linears:
        lora = adapter.read_linear(name)
        groups.setdefault(name.rpartition(".")[2], []).append((lora.rank, lora.scale, _norms(lora)))
    for name, entries in groups.items():
        norms = [norm for _, _, each in entries for norm in each]
        ranks, scales = ({entry[i] for entry in entries} for i in (0, 1))
        mean = sum(norms) / len(norms)
        report.targets.append(Target(name, len(norms), sorted(ranks), sorted(scales), mean, max(norms)))
    if report.targets and max(target.max_norm or 0.0 for target in report.targets) == 0.0:
        report.notes.append("every delta is zero: an adapter that was never trained")
    if adapter.whole:
        report.notes.append(f"{len(adapter.whole)} tensors trained as a whole, first {next(iter(adapter.whole))}")
    partial = [name for name in adapter.base.specs if 0 < len(adapter.projections(name)) < 3]
    if partial:
        report.notes.append(f"{partial[0]} has LoRA on {', '.join(adapter.projections(partial[0]))} only")


def _norms(lora: Lora) -> list[float]:
    """Of each matrix; |b a|^2 is the sum of (b^T b) * (a a^T), which are rank by rank."""
    a, b = lora.a.double(), lora.b.double()
    squares = ((b.mT @ b) * (a @ a.mT)).sum((-2, -1)).clamp_min(0)
    return (lora.scale * squares.sqrt()).abs().reshape(-1).tolist()
