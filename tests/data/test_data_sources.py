"""Reading every kind of source, and one clear line for every kind of trouble."""

import bz2
import gzip
import json
import lzma

import numpy as np
import pytest

from lightning_rlora.data.python_topics import python_topics
from lightning_rlora.data.sources import hold_out, is_on_hub, read_records
from lightning_rlora.errors import UserError

RECORDS = [{"q": "ä, \"b\"\nc", "a": "1"}, {"q": "x\ty", "a": ""}]  # fmt: skip


def read(source, stage="train", **kwargs):
    return list(read_records(source, stage, **kwargs))


def fails(source, *parts, **kwargs):
    with pytest.raises(UserError) as caught:
        read(source, **kwargs)
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def test_json_in_its_three_shapes(write):
    assert read(write("a.json", json.dumps(RECORDS, indent=1))) == RECORDS
    assert read(write("b.json", "\n\n".join(map(json.dumps, RECORDS)))) == RECORDS
    assert read(write("c.json", json.dumps(RECORDS[0], indent=1))) == RECORDS[:1]
    assert read(write("d.jsonl", "\ufeff" + "\n\n".join(map(json.dumps, RECORDS)))) == RECORDS


def test_tables_and_text(write, tmp_path):
    import csv

    for name, delimiter in (("a.csv", ","), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", newline="") as stream:
            writer = csv.DictWriter(stream, ["q", "a"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(RECORDS)
        assert read(str(tmp_path / name)) == RECORDS
    assert read(write("long.csv", "q\n" + "x" * 200_000)) == [{"q": "x" * 200_000}]
    assert read(write("a.txt", "one\ntwo\n")) == [{"text": "one\ntwo\n"}]
    assert read(write("a.md", "# one")) == [{"text": "# one"}]


def test_parquet(tmp_path):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(RECORDS), tmp_path / "a.parquet")
    assert read(str(tmp_path / "a.parquet")) == RECORDS


@pytest.mark.parametrize(
    ("ending", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress), (".bz2", bz2.compress)]
)
def test_compressed(tmp_path, ending, compress):
    path = tmp_path / f"a.json{ending}"
    path.write_bytes(compress(json.dumps(RECORDS).encode()))
    assert read(str(path)) == RECORDS
    path.write_bytes(compress(json.dumps(RECORDS).encode())[:-12])
    fails(str(path), str(path), "cannot be read")
    path.write_bytes(b"not compressed")
    fails(str(path), str(path), "cannot be read")


def test_zst(tmp_path):
    zstandard = pytest.importorskip("zstandard")
    (tmp_path / "a.jsonl.zst").write_bytes(zstandard.compress("\n".join(map(json.dumps, RECORDS)).encode()))
    assert read(str(tmp_path / "a.jsonl.zst")) == RECORDS
    (tmp_path / "b.jsonl.zst").write_bytes(b"not compressed")
    fails(str(tmp_path / "b.jsonl.zst"), "cannot be read")


def test_folders_globs_and_lists(write, tmp_path):
    write("d/b.txt", "2")
    write("d/a.txt", "1")
    write("d/sub/c.md", "3")
    write("d/ignored.png", "x")
    write("d/.hidden/d.txt", "4")
    texts = lambda source: [record["text"] for record in read(source)]  # noqa: E731
    assert texts(str(tmp_path / "d")) == ["1", "2", "3"]
    assert texts(str(tmp_path / "d" / "*.txt")) == ["1", "2"]
    assert texts([str(tmp_path / "d" / "b.txt"), str(tmp_path / "d" / "**" / "*.md")]) == ["2", "3"]
    (tmp_path / "empty").mkdir()
    fails(str(tmp_path / "empty"), "holds no file that ends in .json")
    fails(str(tmp_path / "*.csv"), "no file matches")


def test_missing_files_are_named(tmp_path):
    for source in (str(tmp_path / "none.jsonl"), "none.json.xz", "./none", "~/none", "a/b/c"):
        fails(source, "no such file or folder", source)
    assert is_on_hub("user/name") and is_on_hub("squad") and not is_on_hub("embedded:python-topics")


def test_broken_contents_name_file_and_line(write):
    fails(write("a.jsonl", '{"a": 1}\n\n{"a": 2'), "a.jsonl", "line 3")
    fails(write("b.jsonl", '{"a": 1}\n[1]'), "b.jsonl, line 2", "expected an object", "list")
    fails(write("a.json", '[{"a": 1},\n{"a": 2]'), "a.json", "line 2")
    fails(write("b.json", "[1]"), "b.json, entry 1", "int")
    fails(write("a.csv", "q,a\n1,2\n1,2,3\n"), "a.csv", "line 3", "2 columns")
    fails(write("b.csv", "q,a\n1\n"), "b.csv", "line 2", "2 columns")
    fails(write("c.csv", 'q,a\n"1"2,3\n'), "broken table", "c.csv")
    fails(write("a.parquet", "none"), "a.parquet", "cannot be read as Parquet")
    fails(write("a.doc", "none"), "unknown file ending", ".jsonl")


def test_text_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes("fein\nfähig\n".encode("latin-1"))
    fails(str(tmp_path / "a.txt"), "is not UTF-8 text")


def test_hub(monkeypatch):
    import datasets

    asked = []

    def load(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        return [{"text": split}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read("user/name", "validation", hub_config="main") == [{"text": "validation"}]
    assert read("user/name#train[:10]", "test", streaming=True) == [{"text": "train[:10]"}]
    assert read("squad", "predict") == [{"text": "test"}]
    assert asked == [
        ("user/name", "main", "validation", False),
        ("user/name", None, "train[:10]", True),
        ("squad", None, "test", False),
    ]


@pytest.mark.parametrize(
    ("error", "what"),
    [
        (ConnectionError("Couldn't reach the Hub\nlong story"), "the hub cannot be reached: Couldn't reach the Hub"),
        (FileNotFoundError("no 'user/name' there"), "the hub data set cannot be loaded (split 'train')"),
        (ValueError("Config name is missing."), "Config name is missing."),
    ],
)
def test_hub_trouble(monkeypatch, error, what):
    import datasets

    def load(*_, **__):
        raise error

    monkeypatch.setattr(datasets, "load_dataset", load)
    fails("user/name", "no such file or folder 'user/name'", what)


def test_embedded():
    train, held_out = read("embedded:python-topics", "train"), read("embedded:python-topics", "validation")
    names = [record["topic"] for record in train + held_out]
    assert len(names) == len(set(names)) >= 60
    assert 0.1 < len(held_out) / len(names) < 0.15
    assert held_out == read("embedded:python-topics", "test") == python_topics("predict")
    assert all(record["text"].strip() for record in train)
    fails("embedded:cat", "unknown embedded data set 'embedded:cat'", "embedded:python-topics")


def test_hold_out():
    records = [{"i": i} for i in range(40)]
    kept, held = hold_out(records, 0.1, np.random.default_rng(0))
    assert (len(kept), len(held)) == (36, 4)
    assert sorted(r["i"] for r in kept + held) == list(range(40))
    assert kept == sorted(kept, key=lambda r: r["i"])
    assert hold_out(records, 0.1, np.random.default_rng(0)) == (kept, held)
    assert hold_out(records, 0.1, np.random.default_rng(1)) != (kept, held)
    assert len(hold_out(records[:2], 0.01, np.random.default_rng(0))[1]) == 1
    with pytest.raises(UserError, match="only 1 record"):
        hold_out(records[:1], 0.1, np.random.default_rng(0))
