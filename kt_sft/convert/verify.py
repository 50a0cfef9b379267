"""Reading a container back: every checksum, and the weights against the source they came from."""

from __future__ import annotations

from typing import TYPE_CHECKING

from kt_sft.convert.plan import Experts, check_shapes
from kt_sft.convert.slot import ExpertSlot
from kt_sft.errors import FormatError
from kt_sft.formats.packed import PackedContainer
from kt_sft.formats.packed_manifest import PROJECTIONS
from kt_sft.progress import Move, no_bar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from kt_sft.models.layout import ExpertsSpec


def verify(
    container: PackedContainer,
    source: Experts,
    specs: Mapping[str, ExpertsSpec],
    *,
    progress: Move = no_bar,
) -> None:
    """Check that the files are as they were written, and that they hold the source's weights with the errors they say.

    Raises:
        FormatError: names the first matrix that is damaged or holds other weights.
    """
    manifest = container.manifest
    check_shapes(manifest, specs, container.path)
    total, slot, held = sum(spec.num_experts for spec in specs.values()), None, None
    for done, (name, expert) in enumerate(container.check_blobs(), 1):
        if slot is None or name != held:
            slot, held = ExpertSlot(specs[name], manifest.format, manifest.group), name
            source.close()
        slot.store.copy_expert(0, *container.blobs(name, expert))
        blobs = manifest.layers[name].experts[expert]
        for projection, blob, error in zip(PROJECTIONS, blobs, slot.errors(source.read(name, expert))):
            # Sums of another order (threads) move the last digits; other weights move all, and NaN is within no bound.
            if not abs(error - blob.error) <= 1e-4 * blob.error + 1e-6:
                raise FormatError(
                    container.path / manifest.layers[name].file,
                    f"{projection} of expert {expert} against {source.path}",
                    expected=f"rel-L2 {blob.error:.3g}",
                    found=f"{error:.3g}",
                    remedy="the source is another one now, or the container is damaged; convert again",
                )
        progress(done, total, name)
    source.close()
