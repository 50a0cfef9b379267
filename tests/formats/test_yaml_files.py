"""YAML and JSON that a user or a download brings: what is hostile or misread is one line, in little time and memory."""

from __future__ import annotations

import json
import os
import time
import tracemalloc

import pytest

from kt_sft.errors import ConfigError, FormatError, KTError
from kt_sft.formats.json_object import read_object
from kt_sft.formats.patterns import Allowance, Pattern
from kt_sft.formats.yaml_files import MOST_BYTES, read_yaml
from kt_sft.integrations.llamafactory import run_file
from kt_sft.placement.rules import load_rules, parse_rules

DOUBLING = "".join(f"{chr(97 + i)}: &{chr(97 + i)} [{', '.join([f'*{chr(96 + i)}'] * 9)}]\n" for i in range(1, 12))
FAULTS = {
    "levels": ("[" * 100_000, "more than 32 levels"),
    "levels of mappings": ("{a: " * 5000, "more than 32 levels"),
    "20,000 keys": ("".join(f"k{i}: 1\n" for i in range(20_000)), "more than 10000 keys and values"),
    "aliases that expand": (f"a: &a [x, x, x, x]\n{DOUBLING}", "more than 10000 keys and values"),
    "an alias of itself": ("a: &a {b: *a}", "refers to itself"),
    "merged with itself": ("a: &a {<<: *a}", "refers to itself"),
    "an alias of nothing": ("a: *b", "refers to itself or to nothing"),
    "merged with a number": ("<<: 5", "expected a mapping"),
    "a timestamp": ("a: !!timestamp 2020-13-45", "the tag .*timestamp"),
    "bytes": ("a: !!binary aGk=", "the tag .*binary"),
    "a set": ("a: !!set {a, b}", "the tag .*set"),
    "an object": ("a: !!python/object/apply:os.system [ls]", "the tag .*python"),
    "a tag of its own": ("a: !mine x", "the tag !mine"),
    "no number": ("a: !!int x", "invalid literal"),
    "no flag": ("a: !!bool x", "'x'"),
    "a key twice": ("a: 1\nb: {c: 1, c: 2}", "c is there twice in line 2"),
    "two documents": ("--- {a: 1}\n--- {b: 1}", "a second document"),
    "a tab": ("a:\n\tb: 1", "cannot start any token"),
    "NUL": ("a: \0", "#x0000"),
    "an escaped NUL": ('a: "x\\0"', "a NUL in a text"),
    "a number of 5000 digits": (f"a: {'9' * 5000}", "a number of 5000 digits"),
    "the same in base 16": (f"a: 0x{'f' * 5000}", "a number of 5002 digits"),
    "a list as a key": ("? [a, b]\n: 1", "unhashable"),
    "another version": ("%YAML 3.0\n--- a", "incompatible"),
    "too large": ("a: " + "x" * MOST_BYTES, f"at most {MOST_BYTES} bytes"),
}


def line_of(raised: pytest.ExceptionInfo) -> str:
    text = str(raised.value)
    assert text.isprintable() and len(text) < 8500
    return text


@pytest.fixture
def bounded():
    """Around a test: two seconds and 20 MB, whatever is in the file."""
    tracemalloc.start()
    begin = time.process_time()
    yield
    seconds, peak = time.process_time() - begin, tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert seconds < 2 and peak < 20 << 20


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("door", [run_file.read_run_file, load_rules])
def test_yaml_that_is_refused(tmp_path, bounded, door, fault):
    text, match = FAULTS[fault]
    file = tmp_path / "x.yaml"
    file.write_text(text)
    with pytest.raises(FormatError, match=match) as raised:
        door(file)
    assert line_of(raised).startswith(str(file))


def test_files_that_are_none(tmp_path, bounded):
    os.mkfifo(tmp_path / "pipe.yaml")
    (tmp_path / "folder.yaml").mkdir()
    (tmp_path / "utf16.yaml").write_text("a: 1", encoding="utf-16")
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    names = ["pipe.yaml", "folder.yaml", "utf16.yaml", "loop.yaml", "none.yaml", "a\0b.yaml", "x" * 5000]
    for name in names:
        for door in (run_file.read_run_file, load_rules):
            with pytest.raises(FormatError) as raised:
                door(tmp_path / name)
            line_of(raised)


def test_what_stays_as_it_was(tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("\ufeffa: &a {x: 1, y: [2020-13-45, 1e3, no, 1_000, .inf]}\nb: {<<: *a, y: 2}\nc: 12:30\nd: \n")
    y = ["2020-13-45", 1000.0, False, 1000, float("inf")]
    assert read_yaml(file, "x") == {"a": {"x": 1, "y": y}, "b": {"x": 1, "y": 2}, "c": 750, "d": None}
    file.write_text("")
    assert read_yaml(file, "x") is None and run_file.read_run_file(file) == {}


def test_numbers_in_other_bases_are_refused_where_nobody_else_reads_them(tmp_path):
    for text, base in (("1:30", 60), ("010", 8)):
        (tmp_path / "x.yaml").write_text(f"- match: {{layers: {text}}}\n  replace: {{}}\n")
        with pytest.raises(FormatError, match=f"{text}, a number in base {base} if it is not in quotes"):
            load_rules(tmp_path / "x.yaml")


JSON_FAULTS = {
    "a list": ("[1]", "a JSON list"),
    "nothing": ("", "Expecting value"),
    "a key twice": ('{"a": {"b": 1, "b": 2}}', "found the name 'b' twice"),
    "NaN": ('{"a": NaN}', "found NaN"),
    "levels": ('{"a":' * 100_000, "levels"),
    "forty levels": ('{"a":' * 40 + "1" + "}" * 40, "more than 32 levels"),
    "a number of 5000 digits": ('{"a": ' + "9" * 5000 + "}", "4300 digits"),
    "a byte order mark": ("\ufeff{}", "BOM"),
}


@pytest.mark.parametrize("fault", JSON_FAULTS)
def test_json_that_is_refused(tmp_path, bounded, fault):
    text, match = JSON_FAULTS[fault]
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(FormatError, match=match) as raised:
        read_object(tmp_path / "x.json", "settings")
    line_of(raised)


def test_json_that_is_too_large(tmp_path, bounded):
    with (tmp_path / "x.json").open("wb") as stream:
        stream.truncate(100 << 20)
    with pytest.raises(FormatError, match="expected at most 16777216 bytes, found 104857600"):
        read_object(tmp_path / "x.json", "settings")


def test_infinity_is_a_number(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps({"time_step_limit": [0.0, float("inf")]}))
    assert read_object(tmp_path / "x.json", "settings", may_be_infinite=True)["time_step_limit"][1] == float("inf")


@pytest.mark.parametrize("pattern", [r"^(a|aa)+$", r"^(?:.|\w+)+\d$", r"^(\w|\w\w)+$"])
def test_expressions_have_a_time_limit(bounded, pattern):
    found = Pattern(pattern, "match name", Allowance(0.2))
    with pytest.raises(ConfigError, match="match name .* leave out repetitions inside repetitions") as raised:
        found.search("a" * 60 + "model." * 40 + "!")
    line_of(raised)


def test_ordinary_expressions_have_time_for_a_large_model(bounded):
    found = Pattern(r"^model\.layers\.(?!.*self_attn\.kv_b_proj).*$", "match name", Allowance(0.05))
    assert all(found.search(f"model.layers.{number}.mlp.gate_proj") for number in range(20_000))


@pytest.mark.parametrize(
    "pattern", ["(", "a{99999999999999999999}", "(" * 500 + ")" * 500, "x" * 3000, "(?P<a>x)(?P<a>y)"]
)
def test_expressions_that_are_none(bounded, pattern):
    with pytest.raises(ConfigError, match="expected") as raised:
        Pattern(pattern, "match name")
    line_of(raised)


def rules_of(variables, name="${last}"):
    return {"vars": variables, "rules": [{"match": {"name": name}, "replace": {"class": "default"}}]}


RULE_FAULTS = {
    "doubling": rules_of({f"v{i}": f"${{v{i + 1}}}${{v{i + 1}}}" for i in range(60)} | {"v60": "xx", "last": "${v0}"}),
    "a chain of 2000": rules_of({f"v{i}": f"${{v{i + 1}}}" for i in range(2000)} | {"v2000": "x", "last": "${v0}"}),
    "a rule that doubles": rules_of({"a": "x" * 3000}, "${a}${a}"),
    "a list": rules_of({"last": ["x"]}),
    "a switch": rules_of({"last": True}),
    "nothing": rules_of({"last": None}),
    "unknown ones": rules_of({f"v{i}": "${none}" * 200 for i in range(1000)} | {"last": "x"}),
    "5000 rules": {"rules": [{"match": {"name": "x"}, "replace": {}}] * 5000},
    "unknown keys": {"rules": [{f"key{j}": 1 for j in range(40)} for _ in range(200)]},
    "unknown names": {"rules": [{"match": {"name": "x"}, "replace": {"class": f"Liner{i}"}} for i in range(500)]},
    "layers": {"rules": [{"match": {"layers": "9" * 5000}, "replace": {}}]},
    "devices": {"rules": [{"match": {"name": "x"}, "replace": {"kwargs": {"generate_device": f"cuda:{'9' * 5000}"}}}]},
    "keys of a mapping": {f"key{i}": 1 for i in range(9000)} | {"rules": [{"match": {"name": "x"}, "replace": {}}]},
}


@pytest.mark.parametrize("fault", RULE_FAULTS)
def test_rules_that_are_refused(bounded, fault):
    with pytest.raises(KTError) as raised:
        parse_rules(RULE_FAULTS[fault], "rules.yaml")
    line_of(raised)
