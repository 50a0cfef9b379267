"""Where experts come from, whatever kind of file that is, and what they are loaded into."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from kt_sft.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from kt_sft.models.layout import Formats, Matrices


class ExpertLayer(Protocol):
    """What experts are loaded into: `kt_sft.nn.routed_experts.RoutedExperts`, where each call is described."""

    method: str
    formats: tuple[str, str, str]

    def load_expert(
        self,
        index: int,
        gate: Tensor,
        up: Tensor,
        down: Tensor,
        *,
        origin: Callable[[], Matrices] | None = None,
        is_stored: bool = False,
    ) -> None: ...

    def load_expert_int4(
        self, index: int, gate: tuple[Tensor, Tensor], up: tuple[Tensor, Tensor], down: tuple[Tensor, Tensor]
    ) -> None: ...

    def load_packed(
        self, index: int, blobs: tuple[Any, Any, Any], *, copy: bool, origin: Callable[[], Matrices] | None = None
    ) -> None: ...


class ExpertSource(Protocol):
    """The experts of one model. Opening it has read headers only and has checked names, shapes and types.

    An expert is named by its module's path in the model and its index. A source may be closed between any two calls;
    the next one opens its files again.
    """

    @property
    def path(self) -> Path:
        """File or directory, for messages."""
        ...

    @property
    def kind(self) -> str:
        """What `formats.checkpoint` calls this kind of weights: `safetensors`, `gguf` or `container`; or `tensors`."""
        ...

    @property
    def files(self) -> Sequence[Path]:
        """What it reads, in order; none of tensors."""
        ...

    @property
    def formats(self) -> Mapping[str, tuple[str, str, str]]:
        """How gate, up and down are stored, by module: the names of the file format (`BF16`, `F8_E4M3`, `Q4_K`)."""
        ...

    @property
    def is_packed(self) -> bool:
        """Whether it holds experts as the kernels do, so that nothing is gained by packing them into a container."""
        ...

    @property
    def is_mapped(self) -> bool:
        """Whether experts are used where they lie, in mapped files."""
        ...

    @property
    def int4_group(self) -> int | None:
        """Weights that share a scale, where all experts are stored as int4 matrices of their own; None for others."""
        ...

    def native_formats(self, name: str, method: str, group: int) -> Formats:
        """In what formats the kernels hold a module's gate, up and down by a method of `KTConfig`.

        Args:
            group: weights that share a scale, of INT4 and RAWINT4.
        Raises:
            ConfigError: the method takes something from the files that these do not have.
        """
        ...

    def load(self, experts: ExpertLayer, name: str, expert: int, *, slot: int) -> None:
        """Put one expert into its module, packing where the file is not packed the module's way.

        Args:
            slot: number that it gets there.
        Raises:
            FormatError: a file is gone or no longer the one that was opened.
            ValueError: weights that cannot be packed.
        """
        ...

    def read(self, name: str, expert: int) -> Matrices:
        """gate, up `[inter, hidden]` and down `[hidden, inter]`, bf16; may be views of a mapped file.

        Raises:
            FormatError: a file is gone or no longer the one that was opened.
        """
        ...

    def tensor_names(self, name: str, expert: int) -> tuple[str, str, str]:
        """What the files call the tensors that hold gate, up and down of an expert."""
        ...

    def close(self) -> None:
        """Drop file mappings; tensors already returned stay valid."""
        ...


def check_stored_int4(source: ExpertSource, group: int) -> None:
    """Raise unless method RAWINT4 can take integers and scales as the files hold them.

    Raises:
        ConfigError: weights of another kind, or in other groups.
    """
    if (held := source.int4_group) != group:
        found = f"groups of {held}" if held else f"{next(iter(source.formats.values()))[0]} in {source.path}"
        raise ConfigError(
            f"method RAWINT4: expected a compressed-tensors INT4 checkpoint in groups of {group}, "
            f"found {found}; set int4_group_size to the checkpoint's, or use INT4, INT8 or BF16"
        )
