"""Safetensors checkpoints whose weights may be quantised: the tensors as they would be named and shaped in bf16.

Three public formats are read beside plain floating point, described by `quantization_config` in config.json:

* `fp8` (DeepSeek-V3): `x.weight` e4m3 `[..., n, k]` times `x.weight_scale_inv` `[..., ceil(n / bn), ceil(k / bk)]`,
  blocks `[bn, bk]` from `weight_block_size`; a scale of one element is that of the whole tensor.
* `compressed-tensors`, format `pack-quantized`, 4 bits, symmetric, in groups (Kimi-K2-Thinking): `x.weight_packed`
  int32 `[n, k / 8]`, element j in bits 4 (j % 8) of word j / 8 as q + 8, times `x.weight_scale` `[n, k / group]`.
* `mxfp4` (gpt-oss, whose bf16 form is `x` `[experts, k, n]`): `x_blocks` uint8 `[experts, n, k / 32, 16]`, e2m1 numbers
  with the first in the low half of a byte, times 2^(`x_scales` - 127), uint8 `[experts, n, k / 32]`.
"""

from __future__ import annotations

import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kt_sft.errors import FormatError, UnsupportedModel
from kt_sft.formats.safetensors_index import SafetensorsIndex, TensorInfo
from kt_sft.formats.tensor_errors import INCOMPLETE, SAME_MODEL
from kt_sft.formats.tensor_index import TensorIndex
from kt_sft.native import native

if TYPE_CHECKING:
    from torch import Tensor

FLOAT_DTYPES = ("BF16", "F16", "F32", "F64")
FP8, INT4, MXFP4 = "F8_E4M3", "I4", "MXFP4"
_SCALE_INV, _PACKED, _SCALE, _SHAPE = "_scale_inv", "_packed", "_scale", "_shape"
_BLOCKS, _SCALES = "_blocks", "_scales"
_MXFP4_GROUP = 32
_ZERO_POINT = "_zero_point"
# What quantised checkpoints of all kinds keep beside a weight.
_SIDE = re.compile(
    r"(?P<base>.+\.)(weight_(scale\w*|zero_point|zero|offset|g_idx|global_scale)|pre_quant_scale|g_idx|qzeros|scales|SCB"
    r"|weight\.(scale|absmax|quant_map|nested_absmax|quant_state\..+))"
)
_WEIGHTS = ("weight", "weight_packed", "qweight")
_READ = "weights in bf16, fp16 or fp32, fp8 with block scales, compressed-tensors int4 in groups, or mxfp4"


@dataclass(frozen=True)
class Quantization:
    """How a checkpoint's quantised tensors are to be read.

    Args:
        dtype: `F8_E4M3`, `I4` or `MXFP4`.
        block: rows and columns that share a scale; (1, group) for `I4` and `MXFP4`. None: one scale for the tensor.
    """

    dtype: str
    block: tuple[int, int] | None


def read_quantization(values: Any, source: object) -> Quantization | None:
    """The `quantization_config` of a config.json; None for a checkpoint without one.

    Args:
        source: names the file in messages.
    Raises:
        UnsupportedModel: quantised in a way that is not read.
    """
    if not values:
        return None
    if not isinstance(values, Mapping):
        expected, found = "an object with a quant_method", reprlib.repr(values)
        raise UnsupportedModel(f"{source}: quantization_config", expected=expected, found=found)
    method = values.get("quant_method", "an unnamed method")
    found = f"weights quantised by {method if isinstance(method, str) and len(method) <= 80 else reprlib.repr(method)}"
    if method == "fp8":
        block = values.get("weight_block_size", [128, 128])
        if block is None:
            return Quantization(FP8, None)
        if _is_sizes(block, 2):
            return Quantization(FP8, (block[0], block[1]))
        found += f" with weight_block_size {reprlib.repr(block)}"
    elif method == "compressed-tensors":
        if values.get("format") == "pack-quantized" and (group := _int4_group(values.get("config_groups"))):
            return Quantization(INT4, (1, group))
        found += f" in format {reprlib.repr(values.get('format'))}, or not as symmetric 4-bit integers in groups"
    elif method == "mxfp4":
        return Quantization(MXFP4, (1, _MXFP4_GROUP))
    raise UnsupportedModel(
        f"{source}: quantization_config",
        expected=_READ,
        found=found,
        remedy="use the bf16 version of the checkpoint; this form is not read",
    )


def _int4_group(groups: Any) -> int | None:
    sizes = []
    for group in groups.values() if isinstance(groups, Mapping) else ():
        scheme = group.get("weights") if isinstance(group, Mapping) else None
        if not isinstance(scheme, Mapping) or (scheme.get("num_bits"), scheme.get("type")) != (4, "int"):
            return None
        if scheme.get("symmetric") is not True or scheme.get("strategy") != "group" or scheme.get("actorder"):
            return None
        sizes.append(scheme.get("group_size"))
    return sizes[0] if sizes and _is_sizes(sizes, len(sizes)) and len(set(sizes)) == 1 else None


def _is_sizes(values: Any, count: int) -> bool:
    return isinstance(values, list) and len(values) == count and all(type(v) is int and v > 0 for v in values)


class QuantizedIndex(TensorIndex[TensorInfo]):
    """A `SafetensorsIndex` in which a quantised weight and its scales are one tensor, dequantised when it is read.

    Args:
        index: the files; taken over.
        quantization: what config.json says; None: plain floating point.
    Raises:
        FormatError: a quantised tensor without scales, or with scales of a wrong shape or type.
    """

    kind = "safetensors"

    def __init__(self, index: SafetensorsIndex, quantization: Quantization | None):
        super().__init__(index.source, {}, index.unchanged)
        self._index = index
        self._quantization = quantization
        self._scales: dict[str, str] = {}
        hidden: set[str] = set()
        for key in index if quantization is not None else ():
            if quantization.dtype == FP8 and index.info(key).dtype == FP8:
                hidden.update(self._add(key, key, key + _SCALE_INV))
            elif quantization.dtype == INT4 and key.endswith(_PACKED):
                name = key.removesuffix(_PACKED)
                hidden.update((key, name + _SHAPE, *self._add(name, key, name + _SCALE)))
            elif quantization.dtype == MXFP4 and key.endswith(_BLOCKS):
                name = key.removesuffix(_BLOCKS)
                hidden.update((key, *self._add_mxfp4(name, key, name + _SCALES)))
        for key in index:
            if key not in hidden and not self._is_zero_point(key):
                self._expect_no_side(key)
                self._tensors.setdefault(key, index.info(key))

    def _is_zero_point(self, key: str) -> bool:
        """Whether a tensor holds the zero points of INT4 weights that are symmetric: zeros, in older checkpoints."""
        name = key.removesuffix(_ZERO_POINT)
        if name == key or name not in self._scales or self._tensors[name].dtype != INT4:
            return False
        import torch

        with torch.device("cpu"):  # not that of a model that is being built
            return not bool(self._index.read(key).any())

    def _expect_no_side(self, key: str) -> None:
        """Raise where a tensor makes other numbers of a weight, and nothing says how.

        Raises:
            UnsupportedModel: names it.
        """
        side = _SIDE.fullmatch(key)
        if side and any(side["base"] + end in self._index for end in _WEIGHTS):
            raise UnsupportedModel(
                f"{self._index.info(key).file}: tensor {key}",
                expected="a weight without it, or a quantization_config in config.json that explains it",
                found="neither",
                remedy="use the bf16 version of the checkpoint",
            )

    def _add(self, name: str, key: str, scale_key: str) -> tuple[str]:
        """Register a quantised tensor; returns the keys that are its parts under other names."""
        assert self._quantization is not None
        info, scale = self._index.info(key), self._scale_info(key, scale_key)
        if self._quantization.dtype == INT4 and info.dtype != "I32":
            raise FormatError(info.file, f"tensor {key}", expected="I32", found=info.dtype, remedy=SAME_MODEL)
        shape = info.shape if self._quantization.dtype == FP8 else (*info.shape[:-1], 8 * info.shape[-1])
        rows, cols = shape[-2:] if len(shape) >= 2 else (0, 0)
        block_rows, block_cols = self._quantization.block or (max(rows, 1), max(cols, 1))
        expected = (*shape[:-2], -(-rows // block_rows), -(-cols // block_cols))
        is_single = self._quantization.dtype == FP8 and scale.shape in ((), (1,))
        if (scale.shape != expected and not is_single) or scale.dtype not in FLOAT_DTYPES or len(shape) not in (2, 3):
            raise FormatError(
                scale.file,
                f"tensor {scale_key}",
                expected=f"{' or '.join(FLOAT_DTYPES)} {list(expected)}, for blocks of {block_rows} x {block_cols}",
                found=f"{scale.dtype} {list(scale.shape)}",
                remedy=SAME_MODEL,
            )
        self._tensors[name] = TensorInfo(info.file, self._quantization.dtype, shape)
        self._scales[name] = scale_key
        return (scale_key,)

    def _add_mxfp4(self, name: str, key: str, scale_key: str) -> tuple[str]:
        """The same of experts in MXFP4."""
        info, scale = self._index.info(key), self._scale_info(key, scale_key)
        what = [len(info.shape), info.shape[-1:], info.dtype]
        if what != [4, (_MXFP4_GROUP // 2,), "U8"]:
            expected, found = "U8 [experts, outputs, groups, 16]", f"{info.dtype} {list(info.shape)}"
            raise FormatError(info.file, f"tensor {key}", expected=expected, found=found, remedy=SAME_MODEL)
        scale.expect(scale_key, info.shape[:-1], ("U8",))
        experts, outputs, groups, _ = info.shape
        self._tensors[name] = TensorInfo(info.file, MXFP4, (experts, groups * _MXFP4_GROUP, outputs))
        self._scales[name] = scale_key
        return (scale_key,)

    def _scale_info(self, key: str, scale_key: str) -> TensorInfo:
        if scale_key not in self._index:
            file, expected = self._index.info(key).file, f"its scales in {scale_key}"
            raise FormatError(file, f"tensor {key}", expected=expected, found="no such tensor", remedy=INCOMPLETE)
        return self._index.info(scale_key)

    @property
    def quantized(self) -> Iterable[str]:
        """Names of the quantised tensors."""
        return self._scales.keys()

    @property
    def int4_group(self) -> int | None:
        """Weights that share a scale, of an INT4 checkpoint."""
        q = self._quantization
        return q.block[1] if q is not None and q.dtype == INT4 and q.block is not None else None

    def int4(self, name: str) -> tuple[Tensor, Tensor]:
        """An INT4 matrix as it is stored: uint8 `[n, k / 2]`, q + 8 with the first in the low half, and the scales.

        Raises:
            FormatError: scales that are not bf16.
        """
        import torch

        scales = self._index.info(self._scales[name])
        if scales.dtype != "BF16":
            what = f"tensor {self._scales[name]}"
            remedy = "use method INT4, INT8 or BF16, which round"
            raise FormatError(scales.file, what, expected="BF16 for RAWINT4", found=scales.dtype, remedy=remedy)
        return self._index.read(name + _PACKED).view(torch.uint8), self._index.read(self._scales[name])

    def expect(self, name: str, shape: Sequence[int], dtypes: Sequence[str] = ()) -> TensorInfo:
        """See `SafetensorsIndex.expect`."""
        info = self.info(name)
        info.expect(name, shape, dtypes)
        return info

    def files(self, name: str) -> set[Path]:
        """All files that hold parts of a tensor."""
        return {self.info(name).file} | ({self._index.info(self._scales[name]).file} if name in self._scales else set())

    def read(self, name: str, rows: tuple[int | slice, ...] = ()) -> Tensor:
        """Tensor, or the part of it that `rows` selects on its leading axes: a view of the mapped file, or a new tensor
        in bf16 where it is quantised (the product with the scale is computed in f32 and rounded once).

        Raises:
            FormatError: the checkpoint has no such tensor.
        """
        if name not in self._scales:
            return self._index.read(name, rows)
        info, scale = self.info(name), self._index.read(self._scales[name])
        if info.dtype != MXFP4:
            scale = scale.float()
        if scale.dim() < 2:
            scale = scale.reshape((1,) * len(info.shape)).expand(*info.shape[:-2], 1, 1)
        if len(info.shape) == 2:
            return self._matrix(name, (), scale, rows[0] if rows else slice(None))
        matrix = self._mxfp4 if info.dtype == MXFP4 else self._matrix
        experts = range(info.shape[0])[rows[0]] if rows else range(info.shape[0])
        part = rows[1] if len(rows) > 1 else slice(None)
        if isinstance(experts, int):
            value = matrix(name, (experts,), scale[experts], part)
            return value[..., rows[2]] if len(rows) > 2 else value
        import torch

        return torch.stack([matrix(name, (expert,), scale[expert], part) for expert in experts])

    def close(self) -> None:
        self._index.close()

    def _matrix(self, name: str, at: tuple[int, ...], scale: Tensor, part: int | slice) -> Tensor:
        """Rows `part` of one matrix with scales `[blocks, blocks]`."""
        import torch

        assert self._quantization is not None
        num_rows, cols = self.info(name).shape[-2:]
        wanted = range(num_rows)[part]
        if isinstance(wanted, int):
            return self._matrix(name, at, scale, slice(wanted, wanted + 1))[0]
        block_rows, block_cols = self._quantization.block or (num_rows, cols)
        if scale.shape == (1, 1):
            block_rows, block_cols = num_rows, cols
        begin = wanted.start // block_rows * block_rows  # scales begin with a block
        key = name if self._quantization.dtype == FP8 else name + _PACKED
        raw = self._index.read(key, (*at, slice(begin, wanted.stop))).contiguous().view(torch.uint8)
        scale = scale[begin // block_rows : -(-wanted.stop // block_rows)].contiguous()
        out = torch.empty(wanted.stop - begin, cols, dtype=torch.bfloat16)
        if self._quantization.dtype == FP8:
            native().dequantize_fp8(raw, scale, block_rows, block_cols, out)
        else:
            native().dequantize_int4(raw, scale, block_cols, out)
        return out[wanted.start - begin :: wanted.step]

    def _mxfp4(self, name: str, at: tuple[int, ...], scale: Tensor, part: int | slice) -> Tensor:
        """Rows `part` of one expert's `[k, n]`, a view with the strides of `[n, k]`."""
        import torch

        inputs, outputs = self.info(name).shape[-2:]
        out = torch.empty(outputs, inputs, dtype=torch.bfloat16)
        native().dequantize_mxfp4(self._index.read(name + _BLOCKS, at).flatten(1), scale.contiguous(), out)
        return out.mT[part]
