"""Files as people have them: containers, compression, encodings, folders and patterns; each is read or refused."""

import bz2
import codecs
import csv
import gzip
import json
import lzma
import subprocess
import sys

import datasets
import pyarrow
import pyarrow.feather
import pyarrow.parquet
import pytest
from conftest import ROOT, run_script, write_jsonl

from common.cli import UserError
from common.data import folders, pipeline, readers, sources
from common.data.account import Reasons
from common.settings import check_setting

ROWS = [{"instruction": f"Say {i}.", "output": f"It is {i}."} for i in range(4)]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
CSV = b"instruction,output\n" + b"".join(b"Say %d.,It is %d.\n" % (i, i) for i in range(4))
OK = '{"text": "fine"}\n'


def read(data, **reading):
    """[(what is after the last slash of the place, content of the last turn, or the problem)] of all rows."""
    rows = []
    for source in sources.parse(str(data)):
        for place, chat in sources.read_chats(source, sources.Reading(**reading)):
            rows.append(
                (place.replace("\\", "/").rpartition("/")[2], chat if isinstance(chat, str) else chat[-1]["content"])
            )
    return rows


def answers(data, **reading):
    return [content for _, content in read(data, **reading)]


def zstd(raw: bytes) -> bytes:
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(raw)
    return sink.getvalue().to_pybytes()


def as_parquet(rows) -> bytes:
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), sink)
    return sink.getvalue().to_pybytes()


def as_arrow(rows, new=pyarrow.ipc.new_stream) -> bytes:
    table, sink = pyarrow.Table.from_pylist(rows), pyarrow.BufferOutputStream()
    with new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=3)
    return sink.getvalue().to_pybytes()


# name of the file -> (its bytes, the lines or numbers of the rows)
CONTAINERS = {
    "a.jsonl": (LINES, [1, 2, 3, 4]),
    "a.JSONL": (LINES, [1, 2, 3, 4]),
    "a.v2.ndjson": (LINES, [1, 2, 3, 4]),
    "a.json": (json.dumps(ROWS, indent=1).encode(), [2, 6, 10, 14]),
    "array.jsonl": (json.dumps(ROWS).encode(), [1, 1, 1, 1]),
    "pretty.jsonl": ("\n".join(json.dumps(row, indent=2) for row in ROWS).encode(), [1, 5, 9, 13]),
    "pretty.json": ("\n\n".join(json.dumps(row, indent=2) for row in ROWS).encode(), [1, 6, 11, 16]),
    "mixed.jsonl": ("\n".join(json.dumps(ROWS[i], indent=i % 2 or None) for i in range(4)).encode(), [1, 2, 6, 7]),
    "pretty-first.jsonl": ("\n".join(json.dumps(ROWS[i], indent=(2, None, None, 2)[i]) for i in range(4)).encode(),
                           [1, 5, 6, 7]),
    "commas.json": (",\n".join(json.dumps(row) for row in ROWS).encode() + b",\n", [1, 2, 3, 4]),
    "key.json": (json.dumps({"version": "1", "data": ROWS}, indent=1).encode(), [4, 8, 12, 16]),
    "splits.json": (json.dumps({"test": ROWS[:1], "train": ROWS}, indent=1).encode(), [9, 13, 17, 21]),
    "line.jsonl": (json.dumps({"rows": ROWS}).encode(), [1, 1, 1, 1]),
    "mark.jsonl": (codecs.BOM_UTF8 + LINES + codecs.BOM_UTF8 + b"\n", [1, 2, 3, 4]),
    "joined.jsonl": (LINES[: len(LINES) // 2] + codecs.BOM_UTF8 + LINES[len(LINES) // 2 :], [1, 2, 3, 4]),
    "blank.jsonl": (b"\n\n" + LINES.replace(b"\n", b"\r\n\r\n"), [3, 5, 7, 9]),
    "a.csv": (CSV, [2, 3, 4, 5]),
    "a.tsv": (CSV.replace(b",", b"\t"), [2, 3, 4, 5]),
    "tabs.csv": (CSV.replace(b",", b"\t"), [2, 3, 4, 5]),
    "comma.tsv": (CSV, [2, 3, 4, 5]),
    "semicolon.csv": (codecs.BOM_UTF8 + CSV.replace(b",", b";"), [2, 3, 4, 5]),
    "bar.csv": (CSV.replace(b",", b"|").replace(b"\n", b"\r\n"), [2, 3, 4, 5]),
    "spaces.csv": (CSV.replace(b",", b', "').replace(b"\n", b'"\n'), [2, 3, 4, 5]),
    "excel.csv": (b"sep=;\r\n" + CSV.replace(b",", b";"), [3, 4, 5, 6]),
    "blank.csv": (b"\n" + CSV.replace(b"Say 2", b"\n,\nSay 2"), [3, 4, 7, 8]),
    "a.parquet": (as_parquet(ROWS), [1, 2, 3, 4]),
    "a.arrow": (as_arrow(ROWS), [1, 2, 3, 4]),
    "file.arrow": (as_arrow(ROWS, pyarrow.ipc.new_file), [1, 2, 3, 4]),
    "a.feather": (as_arrow(ROWS, pyarrow.ipc.new_file), [1, 2, 3, 4]),
}  # fmt: skip
COMPRESS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": zstd}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_is_read_with_its_lines_and_sliced(name, tmp_path):
    content, lines = CONTAINERS[name]
    (tmp_path / name).write_bytes(content)
    rows = [(f"{name}:{line}", row["output"]) for line, row in zip(lines, ROWS, strict=True)]
    assert read(tmp_path / name) == rows
    assert read(f"{tmp_path / name}[50%:]") == rows[2:] and read(f"{tmp_path / name}[-3:2]*7") == rows[1:2]


@pytest.mark.parametrize("suffix", COMPRESS)
def test_compressed_files_are_read_whatever_their_name_says(suffix, tmp_path):
    for name, (content, _) in CONTAINERS.items():
        (tmp_path / (name + suffix)).write_bytes(COMPRESS[suffix](content))
        assert answers(tmp_path / (name + suffix)) == [row["output"] for row in ROWS], name
    (tmp_path / "wrong.jsonl").write_bytes(COMPRESS[suffix](LINES))
    (tmp_path / f"plain.jsonl{suffix}").write_bytes(LINES)
    (tmp_path / f"two.jsonl{suffix}").write_bytes(COMPRESS[suffix](LINES) * 2)
    assert len(answers(tmp_path / "wrong.jsonl")) == len(answers(tmp_path / f"plain.jsonl{suffix}")) == 4
    assert len(answers(tmp_path / f"two.jsonl{suffix}")) == 8
    (tmp_path / f"half.jsonl{suffix}").write_bytes(COMPRESS[suffix](LINES)[:-12])
    with pytest.raises(UserError, match=rf"half.jsonl{suffix}: it is damaged .*Copy"):
        read(tmp_path / f"half.jsonl{suffix}")


def test_texts_are_documents(tmp_path):
    for name, raw in {
        "a.txt": b"\xef\xbb\xbfOnce upon a time.\r\n\r\n  The end.\r\n",
        "b.txt": b"\n\nOnce upon a time.\n\n  The end.",
    }.items():
        (tmp_path / name).write_bytes(raw)
        assert read(tmp_path / name) == [(f"{name}:1", "Once upon a time.\n\n  The end.")]
    (tmp_path / "a.txt").write_bytes(gzip.compress("Grüße".encode("cp1252")))
    assert answers(tmp_path / "a.txt", encoding="cp1252") == ["Grüße"]
    assert len(read(f"{tmp_path}/*.txt", encoding="cp1252")) == 2


def test_rows_under_a_key_are_told_from_a_row(tmp_path):
    def written(value):
        (tmp_path / "a.json").write_text(json.dumps(value, indent=1))
        return tmp_path / "a.json"

    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yo"}]
    several = {"test": [{"text": "t"}], "dev": [{"text": "d"}, {"text": 'e: ["x", {"dev": 1}]'}], "n": 2}
    assert answers(written({"messages": turns, "tools": [{"type": "function", "function": {"name": "f"}}]})) == ["Yo"]
    assert answers(written({"text": "x", "sources": [{"url": "y"}]})) == ["x"]
    assert answers(written({"conversations": [{"messages": turns}] * 2})) == ["Yo", "Yo"]
    assert answers(f"{written(several)}:dev") == ["d", 'e: ["x", {"dev": 1}]'] and answers(
        f"{tmp_path}/a.json:test"
    ) == ["t"]
    assert answers(f"{tmp_path}/a.json:dev[1:]*2") == ['e: ["x", {"dev": 1}]']
    for name, words in {
        "a.json": "several keys .test, dev.*a?.json:test",
        "a.json:val": "no rows under a key val",
    }.items():
        with pytest.raises(UserError, match=words):
            read(tmp_path / name)
    assert (
        "must be a list of turns"
        in answers(written({"messages": [], "tools": [{"type": "function", "function": {"name": "f"}}]}))[0]
    )
    write_jsonl(tmp_path / "b.jsonl", ROWS)
    (tmp_path / "b.csv").write_bytes(CSV)
    for name, words in {"b.jsonl:test": "no rows under a key test", "b.csv:test": "leave out :test"}.items():
        with pytest.raises(UserError, match=words):
            read(tmp_path / name)


def test_turns_without_an_object_around_them_are_refused_with_the_form_of_a_row(tmp_path):
    turns = json.dumps([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}])
    (tmp_path / "lines.jsonl").write_text(f"{turns}\n{turns}\n")
    (tmp_path / "array.json").write_text(turns)
    (tmp_path / "columns.json").write_text('{"instruction": ["a", "b"], "output": ["c", "d"]}')
    assert [row for row, _ in read(tmp_path / "lines.jsonl")] == ["lines.jsonl:1", "lines.jsonl:2"]
    assert all('row: must be an object, as {"messages": ' in problem for problem in answers(tmp_path / "lines.jsonl"))
    assert all('row: a turn alone; one row is {"messages": ' in problem for problem in answers(tmp_path / "array.json"))
    (problem,) = answers(tmp_path / "columns.json")
    assert "is this JSON of columns? one row is one object" in problem


def test_cells_of_tables_may_hold_json(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    with open(tmp_path / "turns.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerows([["messages", "tools"], [json.dumps(turns), ""], [json.dumps(turns), "[]"]])
    assert answers(tmp_path / "turns.csv") == ["Hello", "Hello"]
    with open(tmp_path / "history.csv", "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerows([["instruction", "output", "history"], ["Hi", "Hello", "[]"], ["Hi", "Ho", json.dumps(turns)]])
    assert answers(tmp_path / "history.csv") == ["Hello", "Ho"]


@pytest.mark.parametrize("value", ["", "nan", "NaN", "NULL", "null", "None", "<NA>", " NULL "])
def test_what_means_nothing_in_a_table_is_empty(value, tmp_path):
    (tmp_path / "a.csv").write_text(f"instruction,input,output\nNull? nan!,{value},N/A\n")
    ((_, row),) = readers.read_file(tmp_path / "a.csv")
    assert row == {"instruction": "Null? nan!", "input": value.strip() and "", "output": "N/A"}
    write_jsonl(tmp_path / "a.jsonl", [{"instruction": "Hi", "input": "", "output": "None"}])
    assert answers(tmp_path / "a.jsonl") == ["None"]


def test_tables_with_line_ends_in_their_fields(tmp_path):
    (tmp_path / "a.csv").write_bytes(b'instruction, output \r\n"Say\nhi","Hello,\r\n""friend""."\r\nBye,See you.\r\n')
    assert read(tmp_path / "a.csv") == [("a.csv:2", 'Hello,\n"friend".'), ("a.csv:5", "See you.")]
    ((_, row), _) = readers.read_file(tmp_path / "a.csv")
    assert row["instruction"] == "Say\nhi"


@pytest.mark.parametrize("encoding", ["cp1252", "utf-16", "utf-16-le", "utf-32", "latin-1", "gbk"])
def test_encodings_by_setting_and_files_of_utf8_beside_them(encoding, tmp_path):
    word = "你好" if encoding == "gbk" else "Grüße Olé"
    row = {"instruction": "Hi", "output": word}
    text = {
        "a.jsonl": json.dumps(row, ensure_ascii=False) + "\n",
        "a.json": json.dumps([row], ensure_ascii=False, indent=1),
        "a.csv": f"instruction,output\r\nHi,{word}\r\n",
        "a.txt": f"{word}\r\n",
        "end.txt": word,
    }
    for name, content in text.items():
        (tmp_path / name).write_bytes(content.encode(encoding))
        (tmp_path / f"utf8.{name}").write_bytes(content.encode())
        (tmp_path / f"mark.{name}").write_bytes(codecs.BOM_UTF8 + content.encode())
        for prefix in ("", "utf8.", "mark."):
            assert answers(tmp_path / (prefix + name), encoding=encoding) == [word], prefix + name
        try:
            found = answers(tmp_path / name)[0]
        except UserError as error:
            found = str(error)
        assert "not UTF-8: " in found and "ENCODING=" in found and "\n" not in found
        assert f"ENCODING={encoding}" in found or not encoding.startswith("utf")
        with pytest.raises(SystemExit):  # whatever BAD_ROWS says, none of its rows can be read
            sources.check_files({"DATA": str(tmp_path / name), "BAD_ROWS": "skip"}, "DATA")


def test_names_of_encodings_are_checked():
    for name in ("utf-8", "UTF8", "cp1252", "latin-1", "utf-16", "gbk"):
        check_setting("ENCODING", name)
    for name in ("windows", "base64", "rot13", "", "utf-8\0"):
        with pytest.raises(UserError, match="ENCODING=.*cp1252"):
            check_setting("ENCODING", name)


def test_folders_and_patterns_of_shards(tmp_path):
    tmp_path = tmp_path / ".test"  # what is in the names above the folder says nothing
    folder = tmp_path / "a [1:2], b"
    folder.mkdir(parents=True)
    for i in (10, 9, 1):
        write_jsonl(folder / f"train-{i}.jsonl", [{"text": f"{i}a"}, {"text": f"{i}b"}])
    (folder / "README.md").write_text("no data")
    (folder / ".hidden.jsonl").write_text("no data")
    expected = ["1a", "1b", "9a", "9b", "10a", "10b"]
    for name in (
        f'"{folder}"',
        f'"{folder}/"',
        f'"{folder}/*.jsonl"',
        f'"{folder}/train-*"',
        f'"{tmp_path}/**/*.jsonl"',
    ):
        assert answers(name) == expected, name
        assert answers(f"{name}[:50%]*3") == expected[:3] and sources.parse(f"{name}*3")[0].times == 3
    assert read(f'"{folder}/train-[19].jsonl"')[2:] == [("train-9.jsonl:1", "9a"), ("train-9.jsonl:2", "9b")]
    assert answers(f'"{folder}/train-10.jsonl"*2, "{folder}/train-?.jsonl"[:1]') == ["10a", "10b", "1a"]
    assert answers(tmp_path) == expected  # a folder that has none itself
    write_jsonl(folder / "test-1.jsonl", [{"text": "t"}])
    assert answers(f'"{folder}:train"') == expected and answers(f'"{folder}:test"') == ["t"]
    with pytest.raises(UserError, match="holds files of several splits; name one: .*:test, .*:train"):
        read(f'"{folder}"')
    (folder / "train-1.jsonl").write_text("")  # an empty shard
    assert answers(f'"{folder}:train"') == expected[2:]
    for name, words in {
        f'"{folder}:dev"': "no files of the split dev; .*:test",
        f'"{folder}/*.csv"': "file not found",
        f'"{folder}/*"': "files end in .jsonl, .*[.]zst",
        f'"{folder}/**.jsonl"': "no pattern of files",
        f'"{folder}/train-2.jsonl"': "Did you mean .*train-1",
    }.items():
        with pytest.raises(UserError, match=words):
            read(name)


def test_folders_that_hold_no_set_or_several(tmp_path):
    with pytest.raises(UserError, match=r"folder without files that end in .*no report.json"):
        read(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    (tmp_path / "a.csv").write_bytes(CSV)
    with pytest.raises(UserError, match=r"several kinds \(.csv, .jsonl\); name one: .*[*].csv"):
        read(tmp_path)
    (tmp_path / "a.csv").unlink()
    write_jsonl(tmp_path / "test.jsonl", ROWS)
    assert len(read(tmp_path)) == 8 and len(read(f"{tmp_path}:test")) == 4  # no file is left out
    with pytest.raises(UserError, match=r"no files of the split train; .*:test"):
        read(f"{tmp_path}:train")
    (tmp_path / "train").mkdir()
    for name in ("a.jsonl", "test.jsonl"):
        (tmp_path / name).rename(tmp_path / "train" / f"{name[0]}.jsonl")
    (tmp_path / "test").mkdir()
    write_jsonl(tmp_path / "test" / "c.jsonl", [{"text": "t"}])
    assert (
        len(read(f"{tmp_path}:train")) == 8
        and answers(f"{tmp_path}:test") == ["t"]
        and len(read(f"{tmp_path}/*/*.jsonl")) == 9
    )
    (tmp_path / "report.json").write_text("{}")
    for data in (tmp_path, f"data/brief.jsonl, {tmp_path}"):
        with pytest.raises(UserError, match="a folder of prepare_data.py; it can only be DATA, and alone"):
            sources.parse(str(data))
    assert folders.is_prepared(str(tmp_path)) and not folders.is_prepared("data") and not folders.is_prepared(None)


def test_sets_of_save_to_disk(tmp_path):
    rows = [
        {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": str(i)}]} for i in range(12)
    ]
    whole = datasets.Dataset.from_list(rows)
    whole.save_to_disk(tmp_path / "one", num_shards=11)
    whole.shuffle(0).select(range(3)).save_to_disk(tmp_path / "few")
    assert answers(tmp_path / "one") == [str(i) for i in range(12)] and len(answers(f"{tmp_path / 'few'}[:2]")) == 2
    both = datasets.DatasetDict(train=whole, held_out=whole.select([5]))
    both.save_to_disk(tmp_path / "both")
    assert len(answers(tmp_path / "both")) == len(answers(f"{tmp_path / 'both'}:train")) == 12
    assert answers(f"{tmp_path / 'both'}:held_out*2") == ["5"]
    datasets.DatasetDict(a=whole).save_to_disk(tmp_path / "no-train")
    (tmp_path / "one" / "state.json").rename(tmp_path / "state.json")
    (tmp_path / "few" / "state.json").write_text("{}")
    for name, words in {"no-train": "no split train; .*no-train:a", "both:x": "no split x", "few": "damaged"}.items():
        with pytest.raises(UserError, match=words):
            read(tmp_path / name)
    with pytest.raises(UserError, match="one split; leave out :train"):
        datasets.Dataset.from_list(rows).save_to_disk(tmp_path / "again")
        read(f"{tmp_path / 'again'}:train")


def test_names_with_commas_stars_and_brackets(tmp_path):
    for name in ("a, b.jsonl", "a[1].jsonl", "a[1:2]"):
        write_jsonl(tmp_path / name, [{"text": name}, {"text": "2"}]) if "." in name else (tmp_path / name).mkdir()
    write_jsonl(tmp_path / "a[1:2]" / "x.jsonl", [{"text": "in the folder"}])
    data = f'"{tmp_path}/a, b.jsonl"[:1]*2, {tmp_path}/a[1].jsonl[:1], {tmp_path}/a[1:2]'
    assert answers(data) == ["a, b.jsonl", "a[1].jsonl", "in the folder"]
    assert [source.times for source in sources.parse(data)] == [2, 1, 1]
    with pytest.raises(UserError, match="file not found.*with a comma: DATA="):
        sources.parse(f"{tmp_path}/a, b.jsonl")


def test_drive_letters_are_no_splits(monkeypatch):
    for name in (r"C:\no\such.jsonl", r"C:\no\*.jsonl", "C:/no/such.jsonl", "C:such.jsonl"):
        with pytest.raises(UserError, match="file not found"):
            sources.parse(name)


# name of the file -> (its bytes, the line, words of the message), each refused in one line as a whole
UNREADABLE = {
    "empty.csv": (b"", 1, "the file is empty"),
    "blank.jsonl": (b"\n \n", 1, "the file is empty"),
    "blank.txt": (b"\n", 1, "the file is empty"),
    "none.parquet": (as_parquet(ROWS)[:0] or as_arrow(ROWS), 1, "not a readable Parquet file"),
    "half.parquet": (as_parquet(ROWS)[:-9], 1, "not a readable Parquet file"),
    "half.arrow": (as_arrow(ROWS)[:-99], 1, "not a readable Arrow file"),
    "text.arrow": (LINES, 1, "not a readable Arrow file"),
    "parquet.jsonl": (as_parquet(ROWS), 1, "a Parquet file; rename"),
    "arrow.csv": (as_arrow(ROWS), 1, "an Arrow file; rename"),
    "excel.csv": (b"PK\x03\x04....", 1, "an Excel file; .*save it as CSV"),
    "header.csv": (b"instruction,output\n", 1, "a header without rows"),
    "colons.csv": (b"instruction:output\nHi:Hello\n", 1, "one field, 'instruction:output'. It must name the fields"),
    "no-header.csv": (b"Once upon a time\nThe end\n", 1, "one field"),
    "twice.csv": (b"output,instruction,output\na,b,c\n", 1, "the field output twice"),
    "open.csv": (b'instruction,output\nHi,Hello\n"Hi,Hello\nHo,Hm\n', 3, "a quotation mark that is never closed"),
    "python.jsonl": (b"{'text': 'Hi'}\n{'text': 'Ho'}\n", 1, "at column 2; JSON has double quotes, json.dumps"),
    "cut.json": (b'[\n{"text": "a"},\n{"te', 3, r"ends in the middle"),
    "cut-pretty.jsonl": (b'{\n "text": "a"\n}\n{\n "text": "b', 5, r"ends in the middle"),
    "comma.json": (b'[\n{"text": "a"}\n{"text": "b"}\n]', 3, "Expecting ',' delimiter at column 1"),
    "last.json": (b'[\n{"text": "a"},\n]', 3, "a comma too many"),
    "last-field.json": (b'[\n{"text": "a",}]', 2, "at column 14; is there a comma too many"),
    "arrays.json": (b'[{"text":\n"a"}]\n[{"text": "b"}]\n', 3, "Extra data at column 1; a file holds one array"),
    "latin1.json": (b'[\n{"text": "Ol\xe9"}]', 2, "byte 0xE9 at 13; .*ENCODING=cp1252"),
    "mac.csv": (CSV.replace(b"\n", b"\r"), 1, "save it with other line ends"),
    "lfs.jsonl": (b"version https://git-lfs.github.com/spec/v1\noid sha256:4\n", 1, "git lfs pull"),
    "utf16.csv": (CSV.decode().encode("utf-16"), 1, "looks like UTF-16; .*ENCODING=utf-16 "),
    "utf16be.jsonl": (LINES.decode().encode("utf-16-be"), 1, "UTF-16; .*ENCODING=utf-16-be "),
    "utf32.txt": (LINES.decode().encode("utf-32"), 1, "looks like UTF-32; .*ENCODING=utf-32 "),
}  # fmt: skip


@pytest.mark.parametrize("bad_rows", ["stop", "skip"])
@pytest.mark.parametrize("name", UNREADABLE)
def test_files_that_cannot_be_read_stop_with_a_remedy(name, bad_rows, tmp_path, capsys):
    content, line, words = UNREADABLE[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"^[^\n]*{name}:{line}: [^\n]*{words}[^\n]*$"):
        read(tmp_path / name)
    with pytest.raises(SystemExit):
        sources.check_files({"DATA": str(tmp_path / name), "BAD_ROWS": bad_rows}, "DATA")
    assert "ENCODING" in words or "error: " in capsys.readouterr().err


# name of the file -> its bytes, line and words of the row that is invalid, and what the others hold
BAD_ROWS = {
    "json.jsonl": (f"{OK}{{'text': 1}}\n{OK}", 2, "JSON has double quotes", ["fine", "fine"]),
    "first.jsonl": (f'{{"text": \n{OK}{OK}', 1, "not valid JSON: Expecting value", ["fine", "fine"]),
    "last.jsonl": (f'{OK}{OK}{{"text": "cu', 3, "ends in the middle", ["fine", "fine"]),
    "two.jsonl": (f"{OK}{OK.strip()}{OK}", 2, "Extra data at column 17; a row is one JSON", ["fine"]),
    "comma.jsonl": (f"{OK}{OK.strip()},\n{OK}", 2, "Extra data", ["fine", "fine"]),
    "byte.jsonl": (f"{OK}{OK}".encode() + b'{"text": "Ol\xe9"}', 3, "ENCODING=cp1252", ["fine", "fine"]),
    "byte.csv": (b"text,id\nfine,1\nOl\xe9,2\nfine,3\n", 3, "byte 0xE9 at 3; save", ["fine", "fine"]),
    "fields.csv": (b"text,id\nfine,1\nHi, there,2\nfine,3\n", 3, "not 2 fields as in the header", ["fine", "fine"]),
    "quotes.csv": (b'text,id\nfine,1\n"Say "hi" now",2\nfine,3\n', 3, "is written twice", ["fine", "fine"]),
    "again.csv": (b"text,id\nfine,1\n\xef\xbb\xbftext,id\nfine,3\n", 3, "the header again", ["fine", "fine"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_ROWS)
def test_invalid_rows_stop_or_are_left_out(name, tmp_path, capsys):
    content, line, words, others = BAD_ROWS[name]
    file = tmp_path / name
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    settings = {"DATA": str(file), "EVAL_DATA": None}
    with pytest.raises(SystemExit):
        sources.check_files(settings | {"BAD_ROWS": "stop"}, "DATA", "EVAL_DATA")
    error = capsys.readouterr().err
    assert f"{file}:{line}: row: " in error and words in error and "BAD_ROWS=skip" in error and "line 1" not in error
    sources.check_files(settings | {"BAD_ROWS": "skip"}, "DATA", "EVAL_DATA")
    reasons, parts = Reasons(), sources.parse(str(file))
    kept = list(pipeline.read_chats(parts, reasons, bad_rows="skip"))
    assert [chat[0]["content"] for *_, chat in kept] == others and reasons.counts["rows"] == len(others) + 1
    ((reason, count),) = reasons.by_kind()["dropped"].items()
    assert count == 1 and reason.startswith("invalid, row: ") and reason.endswith(f", first at {file}:{line}")
    with pytest.raises(UserError, match="BAD_ROWS=skip"):
        list(pipeline.read_chats(parts, Reasons()))


def test_rows_left_out_are_counted_by_reason_with_the_first_place_of_each(tmp_path, monkeypatch):
    rows = [{"text": "a"}, {"text": ""}, {"text": "b"}, {"text": " "}, {"messages": [{"role": "x: y", "content": "z"}]}]
    write_jsonl(tmp_path / "a.jsonl", rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda name, split: rows)
    reasons = Reasons()
    kept = list(pipeline.read_chats(sources.parse(f"{tmp_path / 'a.jsonl'}, org/name"), reasons, bad_rows="skip"))
    assert [place for _, place, _ in kept] == [f"{tmp_path / 'a.jsonl'}:{i}" for i in (1, 3)] + [
        "org/name:1",
        "org/name:3",
    ]
    dropped = reasons.by_kind()["dropped"]
    assert sorted(dropped.values()) == [2, 4] and all(f", first at {tmp_path / 'a.jsonl'}:" in key for key in dropped)
    with pytest.raises(UserError, match="^org/name:2: text: .*BAD_ROWS=skip"):
        list(pipeline.read_chats(sources.parse("org/name"), Reasons()))


def test_files_without_any_valid_row_stop_even_where_invalid_rows_are_left_out(tmp_path, capsys):
    write_jsonl(tmp_path / "a.jsonl", [{"text": ""}] * 30)
    with pytest.raises(SystemExit):
        sources.check_files({"DATA": f"{tmp_path / 'a.jsonl'}", "BAD_ROWS": "skip"}, "DATA")
    error = capsys.readouterr().err
    assert "30 invalid rows" in error and "... and 10 more" in error and "No row of it is left" in error


def test_fields_that_nobody_reads_may_hold_what_json_lacks(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a", "score": NaN}\n{"text": "b", "score": -Infinity}\n')
    assert answers(tmp_path / "a.jsonl") == ["a", "b"]


def test_files_that_may_not_be_read(tmp_path, monkeypatch, capsys):
    write_jsonl(tmp_path / "a.jsonl", ROWS)

    def refuse(file):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(readers, "open_stream", refuse)
    with pytest.raises(SystemExit):
        sources.check_files({"DATA": str(tmp_path / "a.jsonl")}, "DATA")
    assert "a.jsonl cannot be read: Permission denied." in capsys.readouterr().err


def test_readers_import_nothing_slow():
    code = "import sys, common.data.sources; print({'torch', 'pyarrow', 'datasets', 'numpy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.stdout.strip() == "set()", result.stderr


def test_a_folder_of_shards_is_prepared_and_its_files_are_in_the_account(tmp_path):
    folder = tmp_path / "shards"
    folder.mkdir()
    for i in range(3):
        (folder / f"s-{i}.jsonl.gz").write_bytes(gzip.compress(json.dumps({"text": f"text {i}"}).encode() + b"\n{}\n"))
    settings = f"DATA={folder}", f"OUT_DIR={tmp_path}", "RUN_NAME=p", "EVAL_SIZE=0", "DOCTOR=warn"
    result = run_script("prepare_data.py", *settings)
    assert result.returncode == 2 and "3 invalid rows" in result.stderr and "no report.json" in result.stderr
    result = run_script("prepare_data.py", *settings, "BAD_ROWS=skip")
    assert result.returncode == 0, result.stderr
    account = json.loads((tmp_path / "p" / "report.json").read_text())
    assert account["trained"] == 3 and sum(account["dropped"].values()) == 3
    assert list(account["sources"]) == [str(folder / f"s-{i}.jsonl.gz") for i in range(3)]
