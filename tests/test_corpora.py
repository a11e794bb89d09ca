"""corpora.py: from files in the layouts that people have to pairs, in the official template."""

import gzip
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

import pyarrow as pa
import pytest
from pyarrow import parquet

from support import corpora, files
from support.corpora import here, load, load_jsonl
from support.files import UsageError
from support.language import EOT, Pair, Text, read_sources

# Commas, quotes, a line break in a reference, references apart from each other, non-ASCII text.
E2E = {
    "trainset.csv": """mr,ref
"name[Alimentum], area[city centre], familyFriendly[no]","There is a place, Alimentum, that is not."
"name[The ""Eagle""], eatType[coffee shop], priceRange[£20-25], rating[5 out of 5]","The ""Eagle""
is  good."
"name[Alimentum], area[city centre], familyFriendly[no]",Alimentum is no place for kids.
""",
    "devset.csv": '\ufeffmr,ref\r\n"name[Café Rouge], near[Crowne Plaza]",Café Rouge is naïve.\r\n',
    "testset_w_refs.csv": "mr,ref\nname[Aromi],Aromi.\nname[Aromi],It is Aromi.\n",
}
ENTRY = """<entry category="{}" eid="Id1" size="2">
<originaltripleset><otriple>not | this | one</otriple></originaltripleset>
<modifiedtripleset>
  <mtriple>Aarhus_Airport | cityServed | "Aarhus, Denmark"</mtriple>
  <mtriple> Ajoblanco | country | {} </mtriple>
</modifiedtripleset>
<lex comment="good" lid="Id1"> Aarhus &amp; Ajoblanco, "{}". </lex>
<lex comment="{}" lid="Id2">Second.</lex>
</entry>
"""
WEBNLG = {
    "train/1triples/a.xml": [("Food", "España", "one", "good"), ("City", "Peru", "two", "toredo")],
    "dev/2triples/b.xml": [("Food", "Spain", "one", "good")],
    "test/testdata_with_lex.xml": [
        ("Food", "Spain", "one", "bad"),
        ("Artist", "Chile", "two", "good"),
    ],
}
SOURCE = '| Aarhus_Airport : cityServed : "Aarhus, Denmark" | Ajoblanco : country : '


def put(folder: Path, files: dict[str, str | bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())


def sha256(content: str) -> str:
    return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"


def publish(site, patch, names: dict[str, str], checksums: dict[str, str]) -> None:
    """Have these files downloaded from the site: path below --data-dir -> path on the site."""
    patch.setattr(corpora, "URLS", [[name, f"{site.url}/{at}"] for name, at in names.items()])
    patch.setattr(corpora, "CHECKSUMS", checksums)


def publish_e2e(site, patch) -> None:
    put(site.folder, E2E)
    content = E2E["trainset.csv"].encode()
    git = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    checksums = {name: sha256(text) for name, text in E2E.items()} | {"trainset.csv": f"git:{git}"}
    publish(site, patch, {f"e2e/{name}": name for name in E2E}, checksums)


def webnlg_files() -> dict[str, str]:
    parts = {
        name: "".join(ENTRY.format(*entry) for entry in entries) for name, entries in WEBNLG.items()
    }
    head = '<?xml version="1.0" encoding="UTF-8"?>\n<benchmark>\n<entries>\n'
    return {name: f"{head}{part}</entries>\n</benchmark>\n" for name, part in parts.items()}


def publish_webnlg(site, patch) -> None:
    with tarfile.open(site.folder / "webnlg.tar.gz", "w:gz") as archive:
        for name, content in webnlg_files().items():
            member = tarfile.TarInfo(f"webnlg-dataset-1c77/webnlg_challenge_2017/{name}")
            member.size = len(content.encode())
            archive.addfile(member, io.BytesIO(content.encode()))
    checksum = sha256(webnlg_files()["test/testdata_with_lex.xml"])
    names = {"webnlg/webnlg-dataset.tar.gz": "webnlg.tar.gz"}
    publish(site, patch, names, {"testdata_with_lex.xml": checksum})


def table(rows: list[tuple[str | None, str]]) -> bytes:
    out = io.BytesIO()
    document, summary = zip(*rows, strict=True)
    parquet.write_table(
        pa.table(
            {"document": document, "summary": summary, "id": [str(i) for i in range(len(rows))]}
        ),
        out,
    )
    return out.getvalue()


def whole(data: Text, split: str) -> list[str]:
    """All that the model reads and learns of a split's examples, as text."""
    return [data.encoding.decode([*source, *target]) for source, target in data.examples(split)]


# Official formats


def test_e2e_goes_from_its_csv_files_to_the_official_template(site, tmp_path, monkeypatch):
    publish_e2e(site, monkeypatch)
    data = Text("e2e", "bytes", **load("e2e", tmp_path / "data"))
    assert whole(data, "train") == [
        f" name : Alimentum | area : city centre | family friendly : no {EOT}"
        f" There is a place, Alimentum, that is not. {EOT}",
        f" name : Alimentum | area : city centre | family friendly : no {EOT}"
        f" Alimentum is no place for kids. {EOT}",
        f' name : The " Eagle " | Type : coffee shop | price : £ 20 - 25'
        f" | rating : 5 out of 5 {EOT}"
        f' The "Eagle" is good. {EOT}',
    ]
    assert whole(data, "val") == [
        f" name : Café Rouge | near : Crowne Plaza {EOT} Café Rouge is naïve. {EOT}"
    ]
    assert data.splits["test"] == [Pair("name : Aromi", ["Aromi.", "It is Aromi."])]
    asked = len(site.log)
    assert load("e2e", tmp_path / "data")["splits"] == data.splits
    assert (asked, len(site.log)) == (3, 3)  # nothing was fetched again


@pytest.mark.parametrize("layout", ["", "e2e", "e2e-dataset", "e2e/e2e-dataset-1.0.0"])
def test_e2e_files_that_the_user_has_are_read_and_not_fetched(layout, tmp_path):
    root = tmp_path / ".cache" / "data"  # --data-dir may be hidden; what is hidden in it is no data
    put(root / layout, E2E)
    put(root / layout / ".ipynb_checkpoints", E2E | {"trainset.csv": "mr,ref\nname[A],A\n"})
    assert here("e2e", root)
    assert len(load("e2e", root)["splits"]["train"]) == 2


def test_a_download_that_is_another_file_is_refused(site, tmp_path, monkeypatch):
    publish_e2e(site, monkeypatch)
    put(site.folder, {"trainset.csv": E2E["trainset.csv"].replace("kids", "cats")})
    with pytest.raises(
        UsageError, match=r"trainset.csv.partial has git .* damaged, or another fil"
    ):
        load("e2e", tmp_path / "data")
    assert not (tmp_path / "data" / "e2e" / "trainset.csv").exists()
    publish_webnlg(site, monkeypatch)
    monkeypatch.setitem(corpora.CHECKSUMS, "testdata_with_lex.xml", sha256("another"))
    with pytest.raises(UsageError, match=r"testdata_with_lex.xml has sha256 .* damaged, or anothe"):
        load("webnlg", tmp_path / "data")


def test_git_s_checksum_is_the_name_that_git_gives_a_file(tmp_path):
    (tmp_path / "hello").write_text("hello\n")
    assert (
        files.digest(tmp_path / "hello", "git") == "ce013625030ba8dba906f756967f9e9ca394464a"
    )  # git hash-object


def test_webnlg_goes_from_its_xml_files_to_the_official_template(site, tmp_path, monkeypatch):
    publish_webnlg(site, monkeypatch)
    assert not here("webnlg", tmp_path / "data")
    data = Text("webnlg", "bytes", **load("webnlg", tmp_path / "data"))
    assert whole(
        data, "train"
    ) == [  # only "good" texts; two spaces before the first separator, as the official code
        f'  {SOURCE}España {EOT} Aarhus & Ajoblanco, "one". {EOT}',
        f"  {SOURCE}España {EOT} Second. {EOT}",
        f'  {SOURCE}Peru {EOT} Aarhus & Ajoblanco, "two". {EOT}',
    ]
    assert data.splits["test"] == [  # every text, and whether train has texts of this kind
        Pair(f"{SOURCE}Spain", ['Aarhus & Ajoblanco, "one".', "Second."], "seen"),
        Pair(f"{SOURCE}Chile", ['Aarhus & Ajoblanco, "two".', "Second."], "unseen"),
    ]
    assert here("webnlg", tmp_path / "data")
    assert load("webnlg", tmp_path / "data")["splits"] == data.splits
    assert len(site.log) == 1


@pytest.mark.parametrize(
    "layout", ["", "webnlg", "webnlg-dataset-master/webnlg_challenge_2017", "any"]
)
def test_webnlg_files_that_the_user_has_are_read_and_counted(layout, tmp_path, capsys):
    put(tmp_path / layout, webnlg_files())
    put(tmp_path / layout, {"train/1triples/._a.xml": "what a Mac leaves in an archive"})
    assert len(load("webnlg", tmp_path)["splits"]["test"]) == 2
    assert (
        "'val': 2, 'test': 4} texts here, {'train': 18025, 'val': 2258" in capsys.readouterr().err
    )


def test_a_layout_without_one_of_its_splits_is_not_used(site, tmp_path, monkeypatch):
    publish_webnlg(site, monkeypatch)
    put(tmp_path / "data" / "any", webnlg_files())
    (tmp_path / "data" / "any" / "dev/2triples/b.xml").unlink()
    assert not here("webnlg", tmp_path / "data")
    assert len(load("webnlg", tmp_path / "data")["splits"]["val"]) == 1
    assert len(site.log) == 1
    unpacked = tmp_path / "data/webnlg/unpacked/webnlg-dataset-1c77/webnlg_challenge_2017"
    (unpacked / "dev/2triples/b.xml").unlink()
    with pytest.raises(UsageError, match=r"webnlg is not whole; delete it.*train/\*/\*.xml, dev/"):
        load("webnlg", tmp_path / "data")


def test_xsum_is_cut_to_its_limits_and_gets_no_spaces(site, tmp_path, monkeypatch):
    article = [("d" * 600, "s" * 120), ("Short\nnews.", "“It is”  new."), (None, "No article.")]
    put(site.folder, {"one.parquet": table(article)})
    names = {f"xsum/{name}.parquet": "one.parquet" for name in ("train", "val", "test")}
    test = hashlib.sha256(table(article)).hexdigest()
    publish(site, monkeypatch, names, {"test.parquet": f"sha256:{test}"})
    data = Text("xsum", "bytes", **load("xsum", tmp_path / "data"))
    assert whole(data, "train") == [
        f"{'d' * 512}{EOT}{'s' * 60}{EOT}",
        f"Short news.{EOT}“It is” new.{EOT}",
        f"{EOT}No article.{EOT}",
    ]
    assert len(data.examples("val")[0][1]) == 61  # as for train
    assert len(data.examples("test")[0][1]) == 101  # 100 and the end
    assert data.splits["val"][0].references == ["s" * 120]  # it is scored against all of it
    assert here("xsum", tmp_path / "data")
    put(tmp_path / "data/xsum", {"test.parquet": b"PAR1"})
    with pytest.raises(UsageError, match=r"test.parquet cannot be read"):
        load("xsum", tmp_path / "data")


def test_prefix_tuning_s_own_files_are_read_as_they_stand(tmp_path):
    e2e = {
        "src1_train.txt": "name : A | area : B||A is in B . \nname : A | area : B||B has A . \n",
        "src1_valid.txt": "name : C||C . \n",
        "src1_test.txt": "name : D||D . \nname : D||D !\n",
    }
    put(tmp_path / "e2e_data", e2e)
    data = Text("e2e", "bytes", **load("e2e", tmp_path))
    assert whole(data, "train")[0] == f" name : A | area : B {EOT} A is in B .  {EOT}"  # two blanks
    assert data.splits["test"] == [Pair("name : D", ["D . ", "D !"])]
    put(tmp_path / "e2e_data", {"src1_valid.txt": "name : C|C\n"})
    with pytest.raises(UsageError, match=r"src1_valid.txt line 1: no target, or an empty one"):
        load("e2e", tmp_path)


def test_webnlg_is_the_same_from_prefix_tuning_s_json_as_from_xml(tmp_path):
    put(tmp_path / "xml" / "webnlg", webnlg_files())
    splits = {}
    for name, entries in WEBNLG.items():
        rows = []
        for i, (category, country, text, second) in enumerate(entries, 1):
            facts = [("Aarhus_Airport", "cityServed", '"Aarhus, Denmark"')]
            facts.append(("Ajoblanco", "country", country))
            keys = ("subject", "property", "object")
            texts = [("good", f'Aarhus & Ajoblanco, "{text}".'), (second, "Second.")]
            row = {"category": category}
            row["modifiedtripleset"] = [dict(zip(keys, fact, strict=True)) for fact in facts]
            row["lexicalisations"] = [{"comment": c, "lex": text} for c, text in texts]
            rows.append({str(i): row})
        splits[f"{name.split('/')[0]}.json"] = json.dumps({"entries": rows})
    put(tmp_path / "json" / "webnlg_challenge_2017", splits)
    made = [load("webnlg", tmp_path / kind)["splits"] for kind in ("xml", "json")]
    assert made[0] == made[1]


@pytest.mark.parametrize("kind", ["parquet", "json", "jsonl"])
def test_the_hub_s_tables_are_found_one_folder_deep_and_read(kind, tmp_path):
    rows = {
        "e2e_nlg": {"meaning_representation": "name[A]", "human_reference": "It is  A."},
        "web_nlg": {
            "input": ["A | b | c"],
            "target": "x",
            "references": ["A."],
            "category": "Food",
        },
        "xsum": {"document": "Long.\n", "summary": "Short."},
    }
    source = {"e2e_nlg": "name : A", "web_nlg": "| A : b : c", "xsum": "Long."}
    names = {"parquet": "data/{}-00000-of-00001.parquet", "json": "{}.json", "jsonl": "en/{}.jsonl"}
    for name, row in rows.items():
        for split in ("train", "validation", "test"):
            path = tmp_path / "hub" / name / names[kind].format(split)
            path.parent.mkdir(parents=True, exist_ok=True)
            if kind == "parquet":
                parquet.write_table(pa.Table.from_pylist([row]), path)
            else:
                path.write_text(json.dumps([row]) if kind == "json" else 2 * f"{json.dumps(row)}\n")
        put(tmp_path / "hub" / name, {"challenge_test_x.json": "[]", "ru/test.json": "[]"})
        task = "webnlg" if name == "web_nlg" else name.removesuffix("_nlg")
        assert here(task, tmp_path)
        (pair,) = load(task, tmp_path)["splits"]["test"]
        assert pair.source == source[name]
        assert set(pair.references) in ({"It is A."}, {"A."}, {"Short."})


def test_what_would_do_is_said_when_nothing_is_here_and_nothing_can_be_had(
    site, tmp_path, monkeypatch
):
    publish(site, monkeypatch, {"e2e/trainset.csv": "gone.csv"}, {})
    with pytest.raises(UsageError, match=r"cannot be downloaded.*is read, too: .*src1_train.txt"):
        load("e2e", tmp_path)


def test_sources_are_read_as_training_reads_them(tmp_path, monkeypatch):
    said = ["a\u2028b ", "caf\u00e9", "c"]
    rows = [json.dumps({"source": text}, ensure_ascii=False) for text in said]
    files = {
        "a.jsonl": "\ufeff" + "\r\n".join(rows) + "\n\n",
        "B.JSONL": "\n".join(rows),
        "a.jsonl.gz": gzip.compress("\n".join(rows).encode()),
        "a.txt": "\ufeffa\u2028b \r\ncaf\u00e9 \r\n\r\n  c",
        "a.txt.gz": gzip.compress("a b\ncaf\u00e9\nc".encode()),
    }
    put(tmp_path, files)
    for name in files:
        assert read_sources(tmp_path / name) == ["a b", "caf\u00e9", "c"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(files["a.txt"]))
    assert read_sources("-") == ["a b", "caf\u00e9", "c"]
    for line in ('{"target": "a"}', '{"source": ["a"]}', '{"source": null}'):
        put(tmp_path, {"a.jsonl": f'{{"source": "a"}}\n{line}\n'})
        with pytest.raises(UsageError, match=r'a.jsonl line 2: no \{"source": .*\}, but .*; mend'):
            read_sources(tmp_path / "a.jsonl")


def test_your_own_pairs_are_split_by_source_in_the_same_way_every_time(tmp_path):
    rows = [
        {"source": f"q{i}", "target": [f"a{i}", f"b{i}"] if i % 3 else f"é{i}"} for i in range(40)
    ]
    rows.append({"source": "q7", "target": "c7"})
    path = tmp_path / "mine.jsonl"
    path.write_text(
        "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8"
    )
    data = Text("mine", "bytes", **load_jsonl(path, tmp_path))
    assert {name: len(split) for name, split in data.splits.items()} == {
        "train": 32,
        "val": 4,
        "test": 4,
    }
    found = {pair.source: pair.references for split in data.splits.values() for pair in split}
    assert len(found) == 40  # no source in two splits
    assert (found["q7"], found["q9"]) == (["a7", "b7", "c7"], ["é9"])
    assert load_jsonl(path, tmp_path)["splits"] == data.splits
    assert f" q0 {EOT} é0 {EOT}" in whole(data, "train") + whole(data, "val") + whole(data, "test")
    path.write_text("\n".join(json.dumps(row) for row in rows[:9]))
    with pytest.raises(UsageError, match="has 9 distinct sources"):
        load_jsonl(path, tmp_path)


GOOD = {
    ".csv": "mr,ref\nname[A],B\n",
    ".xml": webnlg_files()["dev/2triples/b.xml"],
    ".jsonl": '{"source": "a", "target": "b"}\n',
}
BAD = {
    "a row of three columns": (".csv", "mr,ref\nname[A],B\nname[A],B,C\n", "line 3: not wanted"),
    "a quote that does not end": (
        ".csv",
        'mr,ref\nname[A],B\nname[A],"B\n',
        r"line 2 \(unexpected end",
    ),
    "text after a quote": (".csv", 'mr,ref\nname[A],B\n"name[A]"x,B\n', r"line 2 \(',' expected"),
    "no list of attributes": (
        ".csv",
        'mr,ref\n"name[A], area",B\n',
        "line 2: not wanted, but {'mr': 'name.A., area'",
    ),
    "an empty reference": (".csv", "mr,ref\nname[A], \n", "line 2: no target, or an empty one"),
    "no reference": (".csv", "mr,ref\nname[A]\n", "line 2: no target, or an empty one"),
    "no first line": (".csv", "name[A],B\nname[A],B\n", "line 2: not wanted"),
    "another encoding": (
        ".csv",
        "mr,ref\nname[A],B\nname[A],Café\n".encode("latin-1"),
        "line 3: not UTF-8",
    ),
    "no rows": (".csv", "mr,ref\n", "holds no pairs"),
    "a tag that does not end": (
        ".xml",
        GOOD[".xml"].replace("</modifiedtripleset>", ""),
        r"mismatched tag: line 12",
    ),
    "a fact of two parts": (
        ".xml",
        GOOD[".xml"].replace("| country |", "country |"),
        "entry 1: not wanted",
    ),
    "an entry without facts": (
        ".xml",
        GOOD[".xml"].replace("mtriple>", "triple>"),
        "entry 1: not wanted",
    ),
    "an empty text": (".xml", GOOD[".xml"].replace("Second.", " "), "entry 1: no target, or an"),
    "a text that is not there": (".xml", GOOD[".xml"].replace("Second.", ""), "entry 1: no"),
    "no JSON": (
        ".jsonl",
        '{"source": "a", "target": "b"}\n\n{"source": "a"\n',
        r"line 3: Expecting ',' delimiter: column 15 \(char 14\); mend it",
    ),
    "no target": (".jsonl", '{"source": "a"}\n', "line 1: no target, or an empty one"),
    "a number for a target": (".jsonl", '{"source": "a", "target": 3}\n', "line 1: not wanted"),
    "an object for a target": (".jsonl", '{"source": "a", "target": {"b": "c"}}\n', "line 1: not"),
    "a number among targets": (".jsonl", '{"source": "a", "target": ["b", 3]}\n', "line 1: not"),
    "a list for a source": (".jsonl", '{"source": ["a"], "target": "b"}\n', "line 1: not wanted"),
    "no object": (".jsonl", "[1, 2]\n", "line 1: no object in braces"),
    "an empty target": (
        ".jsonl",
        '{"source": "a", "target": ["b", ""]}\n',
        "line 1: no target, or an empty one",
    ),
    "no targets": (".jsonl", '{"source": "a", "target": []}\n', "line 1: no target, or an empty"),
}
ROWS = {".csv": corpora.e2e_row, ".xml": corpora.webnlg_row, ".jsonl": corpora.own_row}


@pytest.mark.parametrize("fault", BAD)
def test_a_malformed_file_is_one_sentence_with_file_and_line(fault, tmp_path):
    kind, content, said = BAD[fault]
    path = tmp_path / f"file{kind}"
    put(tmp_path, {path.name: GOOD[kind]})
    assert len(corpora.pairs([path], ROWS[kind], "test", "wanted")) == 1
    put(tmp_path, {path.name: content})
    with pytest.raises(UsageError, match=f"^{path}.*{said}") as error:
        corpora.pairs([path], ROWS[kind], "test", "wanted")
    assert "\n" not in str(error.value)
