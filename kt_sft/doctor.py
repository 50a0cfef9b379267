"""What this machine and environment offer to kt_sft, and what stands in the way, as plain data for `kt-sft doctor`."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kt_sft import env, memory
from kt_sft.compat.releases import release_of
from kt_sft.errors import GIB, ConfigError, KTError, first_line

# Shown in this order; ranges come from the metadata of the installed kt_sft, so that they are stated once.
PACKAGES = ("torch", "transformers", "peft", "accelerate", "llamafactory", "deepspeed")
REQUIRED = frozenset({"torch", "transformers", "peft", "accelerate"})
FORMATS = ("bf16", "int8", "int4")
# Direction and kind of rows of every product; block floating point and int8 rows exist in the forward only.
PRODUCTS = (("forward", "bf16"), ("forward", "bfp16"), ("forward", "int8"), ("input_grad", "bf16"))
MAX_SIZE = 1 << 24  # of m, n and k
NO_AMX = "the CPU has no AMX"
BUILD_REMEDY = "in a clone: make setup; otherwise: pip install --force-reinstall --no-deps kt_sft"


@dataclass(frozen=True)
class Finding:
    """One thing that the user should know. `level`: error (training cannot work), warning (part of it cannot), note."""

    level: str
    what: str
    remedy: str


@dataclass
class Report:
    """Facts by topic; every value is plain data, so that `asdict` gives the JSON form."""

    machine: dict[str, Any] = field(default_factory=dict)
    kernels: dict[str, Any] = field(default_factory=dict)
    gpus: list[dict[str, Any]] = field(default_factory=list)
    versions: list[dict[str, Any]] = field(default_factory=list)
    hook: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing forbids training."""
        return all(finding.level != "error" for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, with `ok` among them."""
        return {"ok": self.ok, **asdict(self)}

    def add(self, level: str, what: str, remedy: str) -> None:
        """Append a finding."""
        self.findings.append(Finding(level, what, remedy))


def collect() -> Report:
    """Look at everything; a part that cannot be examined becomes a finding, never an exception."""
    report = Report()
    report.environment = {v.name: value for v in env.VARIABLES if (value := env.read(v.name)) is not None}
    for part in (_native, _memory, _gpus, _versions, _hook):
        try:
            part(report)
        except Exception as error:  # a doctor must not die of the illness
            what = f"the check of {part.__name__.strip('_')} failed: {type(error).__name__}: {error}"
            report.add("error", what, "correct what the message names; if it names nothing of yours, report it")
    order = {"error": 0, "warning": 1, "note": 2}
    report.findings.sort(key=lambda finding: order[finding.level])
    return report


@dataclass(frozen=True)
class KernelChoice:
    """The kernels for weights of one format and rows of one kind in one direction.

    Args:
        weights: name of the weight format.
        rows: what the activations (or gradients) are in the product: bf16, bfp16 or int8.
        op: forward or input_grad.
        verdicts: number of rows -> what became of each row of the kernel table.
    """

    weights: str
    rows: str
    op: str
    verdicts: dict[int, list[dict[str, Any]]]

    def chosen(self, m: int) -> dict[str, Any] | None:
        """The row of the table that m rows take; None: no kernel makes this product."""
        return next((row for row in self.verdicts[m] if row["chosen"]), None)

    def runners_up(self, m: int) -> list[dict[str, Any]]:
        """The rows of the table that could make the product, too, the cheapest first."""
        able = [row for row in self.verdicts[m] if not row["refusal"] and not row["chosen"]]
        return sorted(able, key=lambda row: row["cycles"])


def kernel_choices(formats: Sequence[str] | None, ms: Sequence[int], *, n: int, k: int) -> list[KernelChoice]:
    """Which kernel would be chosen and why not another, for weights `[n, k]` in both directions with all their rows.

    Args:
        formats: names of weight formats, those of GGUF files among them; None: one for each kind of kernels.
        ms: numbers of rows that meet in one product.
        n: outputs of the weights.
        k: inputs of the weights.

    Raises:
        ConfigError: a format or a level of KT_SFT_ISA that is not there, or a size out of range.
    """
    from kt_sft.native import native

    library = native()
    for name, sizes in (("m", ms), ("n", [n]), ("k", [k])):
        for size in sizes:
            if not 1 <= size <= MAX_SIZE:
                raise ConfigError(f"{name}: expected whole numbers from 1 to {MAX_SIZE}, found {size}")
    if formats is None:
        formats = [*FORMATS, "f16", *(names[0] for names in _gguf_types(library).values())]
    blocks = {kind["name"]: kind["block"] for kind in library.block_types()}
    choices = []
    try:
        if (wanted := env.isa()) is not None:
            library.set_isa(wanted)
        for weights in formats:
            if k % blocks.get(weights, 1):
                raise ConfigError(f"k: expected a multiple of {blocks[weights]}, the block of {weights}, found {k}")
            for op, rows in PRODUCTS:
                verdicts = {m: library.judge_kernels(weights, rows, op, m, n, k) for m in ms}
                # Block floating point where there is none is bf16.
                own = [row for rest in verdicts.values() for row in rest if row["rows"] == rows]
                if any(row["refusal"] in ("", "max_m", "row_length") for row in own):
                    choices.append(KernelChoice(weights, rows, op, verdicts))
    except ValueError as error:  # a name that the library does not know, a level that the CPU lacks
        raise ConfigError(first_line(error)) from None
    return choices


def _native(report: Report) -> None:
    """Processor, kernel levels and rows, from the compiled library; from /proc where that is missing."""
    from kt_sft.native import native

    try:
        library = native()
    except ImportError as error:
        report.machine.update(_cpu_without_library())
        report.kernels = {"built": False, "detected": [], "active": None, "rows": [], "threads": None, "amx": None}
        report.add("error", f"the native library is missing: {first_line(error)}", BUILD_REMEDY)
        return
    report.machine.update(library.cpu_info())
    wanted = env.isa()
    if wanted is not None:
        try:
            library.set_isa(wanted)
        except ValueError as error:
            remedy = f"unset KT_SFT_ISA or set it to one of: {', '.join(library.isa_detected())}"
            report.add("error", f"KT_SFT_ISA={wanted}: {first_line(error)}", remedy)
    report.kernels = {
        "built": True,
        "version": library.version(),
        "detected": list(library.isa_detected()),
        "active": library.isa_active(),
        "rows": [dict(row) for row in library.kernel_rows()],
        "threads": library.default_threads(),
        "amx": library.amx_refusal() or "yes",
        "gguf_types": _gguf_types(library),
        "inference_activations": {name: library.default_rows(name) for name in FORMATS},
    }
    if library.amx_refusal() not in ("", NO_AMX):
        remedy = "use Linux 5.16 or later; in a container its seccomp profile must let arch_prctl pass"
        report.add("warning", f"the CPU has AMX, but it cannot be used: {library.amx_refusal()}", remedy)
    if "avx2" not in report.kernels["detected"]:
        remedy = (
            "use a machine with AVX2: Intel since 2013, AMD since 2015 (virtual machines: expose the host's CPU flags)"
        )
        report.add("error", "this CPU has no AVX2; the scalar kernels are for tests only", remedy)
    elif report.kernels["active"] == "scalar":
        report.add("warning", "the kernels are narrowed to scalar, which is for tests", "unset KT_SFT_ISA")
    try:
        report.kernels["threads"] = env.threads() or report.kernels["threads"]
    except KTError as error:
        report.add("error", str(error), "unset KT_SFT_THREADS")


def _cpu_without_library() -> dict[str, Any]:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    model = next(
        (line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine()
    )
    return {
        "model_name": model,
        "logical_cpus": len(os.sched_getaffinity(0)),
        "physical_cores": None,
        "numa_nodes": None,
        "quota_cpus": None,
    }


def _memory(report: Report) -> None:
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = memory.available_memory()
    report.machine["memory"] = {
        "total_gib": round(total / GIB, 2),
        "available_gib": round(available.bytes / GIB, 2),
        "limited_by": available.limited_by,
    }
    if available.bytes < 2 * GIB:
        what = f"only {available.bytes / GIB:.2f} GiB of memory can still be taken ({available.limited_by})"
        report.add("warning", what, "stop other programs or raise the container's limit")


def _gpus(report: Report) -> None:
    try:
        import torch
    except Exception as error:  # a torch that is broken raises OSError, RuntimeError, ...
        if release_of("torch") is not None:
            report.add(
                "error", f"torch cannot be imported: {first_line(error)}", "reinstall torch (in a clone: make setup)"
            )
        return
    for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        properties = torch.cuda.get_device_properties(index)
        report.gpus.append(
            {"index": index, "name": properties.name, "memory_gib": round(properties.total_memory / GIB, 2)}
        )
    if not report.gpus and _driver_sees_gpu():
        build = f"a build for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build"
        what = f"the driver sees an NVIDIA GPU, but torch {torch.__version__} ({build}) does not"
        report.add("warning", what, "install a torch build that fits the driver; until then everything runs on the CPU")
    elif not report.gpus:
        remedy = "nothing to do for small models; `bf16: true` in LLaMA-Factory needs `use_cpu: true` beside it"
        report.add("note", "no GPU: attention and the rest of the model run on the CPU, too", remedy)


def _driver_sees_gpu() -> bool:
    command = shutil.which("nvidia-smi")
    if command is None:
        return False
    try:
        run = subprocess.run([command, "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return run.returncode == 0 and "GPU" in run.stdout


def _versions(report: Report) -> None:
    if sys.platform != "linux" or platform.machine() != "x86_64":
        what = f"the kernels are written for Linux x86-64, found {platform.system()} {platform.machine()}"
        report.add("error", what, "use a Linux x86-64 machine")
    ranges = _supported_ranges()
    if not ranges:
        report.add(
            "warning",
            "kt_sft is imported from a folder, not installed; LLaMA-Factory will not find it",
            "pip install .",
        )
    report.versions.append(_judged(report, "python", platform.python_version(), ranges.get("python")))
    own = release_of("kt_sft")
    report.versions.append({"name": "kt_sft", "installed": own, "supported": None, "ok": own is not None})
    for name in PACKAGES:
        report.versions.append(_judged(report, name, release_of(name), ranges.get(name)))


def _judged(report: Report, name: str, installed: str | None, supported: str | None) -> dict[str, Any]:
    """One row of the version table; adds a finding where the version is missing or out of range."""
    ok: bool | None = None
    command = f'pip install "{name}{supported or ""}"'
    if installed is None:
        if name in REQUIRED:
            report.add("error", f"{name} is not installed", command)
            ok = False
    elif supported is not None:
        from packaging.specifiers import SpecifierSet

        ok = SpecifierSet(supported).contains(installed, prereleases=True)
        if not ok:
            level = "error" if name in REQUIRED or name == "python" else "warning"
            remedy = f"use Python {supported}" if name == "python" else command
            report.add(level, f"{name} {installed} is outside the supported range {supported}", remedy)
    return {"name": name, "installed": installed, "supported": supported, "ok": ok}


def _supported_ranges() -> dict[str, str]:
    """Package -> version specifier in kt_sft's own metadata, extras included; empty if kt_sft is not installed."""
    try:
        metadata = importlib.metadata.metadata("kt_sft")
    except importlib.metadata.PackageNotFoundError:
        return {}
    from packaging.requirements import Requirement

    requirements = [Requirement(text) for text in metadata.get_all("Requires-Dist") or []]
    # ">=" before "<", as people write it.
    ranges = {r.name: ",".join(sorted(map(str, r.specifier), reverse=True)) for r in requirements if r.specifier}
    return {"python": metadata.get("Requires-Python", ">=3.11"), **ranges}


def _hook(report: Report) -> None:
    from kt_sft.integrations.llamafactory import autoload

    status = autoload.status()
    report.hook = status
    if status["active"]:
        return
    # Not asking for the hook is a choice; asking for it in vain is a problem.
    level = "warning" if env.use_kt() or status.get("failed") else "note"
    what = f"the LLaMA-Factory hook is not active: {status['reason']}"
    if not env.use_kt() and status.get("llamafactory"):
        what += " (LLaMA-Factory itself answers `use_kt: true` by asking for other packages)"
    report.add(level, what, status["remedy"])


def _gguf_types(library: Any) -> dict[str, list[str]]:
    """Kernel format -> the block types of GGUF files that it takes."""
    types: dict[str, list[str]] = {}
    for kind in library.block_types():
        types.setdefault(kind["format"], []).append(kind["name"])
    return types
