"""The cheap digest of source files: what it sees of an edit."""

from __future__ import annotations

import pytest

from kt_sft.formats.source_hash import hash_source

MIB = 1 << 20


@pytest.mark.parametrize("at", [0, MIB - 1, 2 * MIB + 5, 3 * MIB + 4], ids=["first", "first MiB", "last MiB", "last"])
def test_digest_of_a_source_follows_both_ends(tmp_path, at):
    file = tmp_path / "model.safetensors"
    data = bytearray(3 * MIB + 5)
    file.write_bytes(data)
    before = hash_source(file)
    assert (before.name, before.size) == (file.name, len(data)) and hash_source(file) == before
    data[at] = 1
    file.write_bytes(data)
    assert hash_source(file).digest != before.digest


def test_digest_follows_the_size(tmp_path):
    file = tmp_path / "model.safetensors"
    digests = set()
    for size in (0, 1, 2, MIB, MIB + 1):
        file.write_bytes(bytes(size))
        digests.add(hash_source(file).digest)
    assert len(digests) == 5
