"""Tables become samples: columns by name, labels by name and number, and errors that say what there is."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from adaptive_tangents.errors import TangentError
from adaptive_tangents.loading import Data, load_data


def letters(texts: list[str], seconds: list[str] | None = None, max_length: int = 30) -> dict[str, torch.Tensor]:
    """A tokenizer: the codes of characters, padded with zeros; a pair is joined by code 1."""
    joined = texts if seconds is None else [f"{a}\x01{b}" for a, b in zip(texts, seconds, strict=True)]
    codes = [torch.tensor([ord(c) for c in text[:max_length]]) for text in joined]
    ids = torch.nn.utils.rnn.pad_sequence(codes, batch_first=True)
    return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def written(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(folder: Path, name: str, content: str | bytes, **options: Any) -> Data:
    return load_data(written(folder, name, content), tokenizer=letters, **options)


def told(data: Data, words: str) -> bool:
    return any(words in note for note in data.notes)


def test_tweets_with_newlines_quotes_and_emoji_are_read_as_they_are(tmp_path: Path) -> None:
    content = (
        '\ufefftweet,sentiment\n"good 😀\nmovie, ""great""",positive\n\nthe film,Positive \n"awful\r\nplot",negative\n'
    )
    data = read(tmp_path, "tweets.csv", content)
    assert data.texts == ('good 😀\nmovie, "great"', "the film", "awful\r\nplot")
    assert data.classes == ("negative", "positive")
    assert data.y is not None
    assert data.y.tolist() == [1, 1, 0]
    assert told(data, "'Positive' is 'positive'")
    assert told(data, "0 is 'negative', 1 is 'positive'")
    assert told(data, "Texts are the column 'tweet'")


@pytest.mark.parametrize(
    ("classes", "numbers"),
    [
        (("negative", "positive"), [1, 1, 0]),
        (("Positive", "Neutral", "Negative"), [0, 0, 2]),  # without regard to capitals
        (("LABEL_0", "LABEL_1"), [1, 1, 0]),  # names that say nothing: sorted
    ],
)
def test_labels_as_text_get_the_numbers_of_the_networks_classes(
    tmp_path: Path, classes: tuple[str, ...], numbers: list[int]
) -> None:
    data = read(tmp_path, "a.csv", "text,label\na,positive\nb,Positive\nc,negative\n", classes=classes)
    assert data.y is not None
    assert data.y.tolist() == numbers


def test_numbers_that_are_names_of_classes_are_taken_by_name_and_told(tmp_path: Path) -> None:
    data = read(tmp_path, "a.csv", "text,stars\na,1\nb,5\n", classes=("1", "2", "3", "4", "5"))
    assert data.y is not None
    assert data.y.tolist() == [0, 4]
    assert told(data, "'1' is the network's class number 0")


@pytest.mark.parametrize(
    ("values", "classes", "wanted"),
    [
        ("0.0 1.0 1.0", None, torch.tensor([0, 1, 1])),
        ("0.0 2.0 1.0", None, torch.tensor([0.0, 2.0, 1.0]).double()),
        ("0.0 2.0 1.0", ("a", "b", "c"), torch.tensor([0, 2, 1])),
        ("0.5 2.0 1.0", ("a", "b", "c"), torch.tensor([0.5, 2.0, 1.0]).double()),
        ("0 2 1", None, torch.tensor([0, 2, 1])),
        ("1 5 3", ("LABEL_0",), torch.tensor([1.0, 5.0, 3.0]).double()),  # a network for regression
    ],
)
def test_integers_are_classes_and_decimals_are_amounts_unless_they_can_only_be_classes(
    tmp_path: Path, values: str, classes: tuple[str, ...] | None, wanted: torch.Tensor
) -> None:
    rows = "".join(f"t,{value}\n" for value in values.split())
    data = read(tmp_path, "a.csv", f"text,label\n{rows}", classes=classes)
    assert data.y is not None
    assert data.y.dtype == wanted.dtype
    assert torch.equal(data.y, wanted)


def test_numeric_columns_are_features_without_the_index(tmp_path: Path) -> None:
    data = read(tmp_path, "iris.csv", "Id,Sepal Length,width,target\n1,5.1,3,0\n2,-.4,1e2,1\n")
    assert torch.equal(torch.as_tensor(data.x), torch.tensor([[5.1, 3.0], [-0.4, 100.0]], dtype=torch.float64))
    assert told(data, "x holds the 2 numeric columns Sepal Length, width")
    assert told(data, "without Id")


def test_pairs_of_texts_go_to_the_tokenizer_as_two_lists(tmp_path: Path) -> None:
    lines = [{"idx": k, "sentence1": "a", "sentence2": "bc", "label": k} for k in range(2)]
    data = read(tmp_path, "mrpc.jsonl", "\n".join(map(json.dumps, lines)) + "\n\n")
    assert data.texts == ("a / bc", "a / bc")
    assert isinstance(data.x, dict)
    assert data.x["input_ids"].tolist() == [[97, 1, 98, 99]] * 2
    other = read(tmp_path, "other.csv", "left,right,label\na,bc,0\n", text="left,right")
    assert isinstance(other.x, dict)
    assert other.x["input_ids"].tolist() == [[97, 1, 98, 99]]


def test_a_quote_inside_an_unquoted_tsv_swallows_no_lines(tmp_path: Path) -> None:
    content = 'sentence\tlabel\n"bad film\t0\nhe said "no\t0\nit\'s "good\t1\n'
    assert read(tmp_path, "sst.tsv", content).texts == ('"bad film', 'he said "no', "it's \"good")


@pytest.mark.parametrize("name", ["a.csv", "a.tsv"])
def test_separators_of_other_programs_are_recognized(tmp_path: Path, name: str) -> None:
    mark = ";" if name == "a.csv" else "\t"
    data = read(tmp_path, name, f"text{mark}label\nso, good{mark}pos\nbad{mark}neg\n")
    assert data.texts == ("so, good", "bad")
    excel = written(tmp_path, "excel.csv", "text\tlabel\ngüt\tpos\nbad\tneg\n".encode("utf-16"))
    assert load_data(excel, tokenizer=letters).texts == ("güt", "bad")


def test_a_json_list_is_read_and_labels_may_be_lists_of_numbers(tmp_path: Path) -> None:
    records = [{"review": "a", "labels": [0.5, 1.0]}, {"review": "b", "labels": [0.0, 2.0]}]
    data = read(tmp_path, "a.json", json.dumps(records))
    assert data.y is not None
    assert data.y.tolist() == [[0.5, 1.0], [0.0, 2.0]]


def test_at_most_as_many_rows_are_read_as_asked_for_and_told(tmp_path: Path) -> None:
    rows = "".join(f"{k},{k % 2}\n" for k in range(50))
    data = read(tmp_path, "a.csv", f"v,label\n{rows}", most=7, seed=3)
    assert data.n == 7
    assert torch.equal(torch.as_tensor(data.x)[:, 0] % 2, data.y)
    assert told(data, "7 of the 50 samples were read, drawn with seed 3")


def test_numbers_of_classes_do_not_depend_on_which_rows_are_read(tmp_path: Path) -> None:
    rows = "".join(f"t{k},{'abc'[k % 3]}\n" for k in range(30))
    for seed in range(6):
        data = read(tmp_path, "a.csv", f"text,label\n{rows}", most=2, seed=seed)
        assert data.classes == ("a", "b", "c")
        assert data.texts is not None
        assert data.y is not None
        assert data.y.tolist() == [int(text[1:]) % 3 for text in data.texts]


def test_a_label_that_names_several_classes_is_refused_and_others_are_matched(tmp_path: Path) -> None:
    birds = ("crane", "Kite", "crane", "tench, Tinca", "kite")
    words = r"the label 'crane' at line 3 of .*a\.csv names several of the network's classes, 0, 2; give labels as"
    with pytest.raises(TangentError, match=words):
        read(tmp_path, "a.csv", 'text,label\na,"tench, Tinca"\nb,crane\n', classes=birds)
    with pytest.raises(TangentError, match=r"the label 'KITE' at line 2 of .* names several .* 1, 4"):
        read(tmp_path, "a.csv", "text,label\na,KITE\n", classes=birds)
    with pytest.raises(TangentError, match=r"the label 'owl' at line 2 of .* is none of the network's classes"):
        read(tmp_path, "a.csv", "text,label\na,owl\n", classes=birds)
    data = read(tmp_path, "a.csv", 'text,label\na,"TENCH, tinca"\nb,kite\nc,Kite\n', classes=birds)
    assert data.y is not None
    assert data.y.tolist() == [3, 4, 1]
    numbers = read(tmp_path, "a.csv", "text,label\na,2\nb,0\n", classes=birds)
    assert numbers.y is not None
    assert numbers.y.tolist() == [2, 0]
    numerals = read(tmp_path, "a.csv", "text,label\na,2\nb,0\n", classes=("0", "2", "2"))
    assert numerals.y is not None
    assert numerals.y.tolist() == [2, 0]


def test_texts_held_out_are_padded_and_numbered_together_with_the_others(tmp_path: Path) -> None:
    held = written(tmp_path, "held.csv", "text,label\na longer text,c\n")
    data = read(tmp_path, "a.csv", "text,label\nab,b\nc,a\n", held_out=held)
    assert data.held_out is not None
    assert data.held_out.tolist() == [False, False, True]
    assert data.classes == ("a", "b", "c")
    assert data.y is not None
    assert data.y.tolist() == [1, 0, 2]
    assert isinstance(data.x, dict)
    assert data.x["input_ids"].shape == (3, 13)
    assert data.texts == ("ab", "c", "a longer text")
    kept = data.take(torch.tensor([2, 0]))
    assert kept.texts == ("a longer text", "ab")
    assert kept.held_out is not None
    assert kept.held_out.tolist() == [True, False]


def test_the_tokenizers_length_can_be_given(tmp_path: Path) -> None:
    data = read(tmp_path, "a.csv", "text,label\nabcdef,b\nc,a\n", max_length=4)
    assert isinstance(data.x, dict)
    assert data.x["input_ids"].shape == (2, 4)
    assert told(data, "1 of the 2 texts reach 4 tokens")


REFUSED: dict[str, tuple[str, str, dict[str, Any], str]] = {
    "no tokenizer": ("a.csv", "text,label\na,0\n", {"tokenizer": None}, "holds texts, .* give --tokenizer DIR"),
    "no column named as asked": ("a.csv", "text,label\na,0\n", {"text": "body"},
        r"no column 'body'; its columns are text \(text\), label \(numbers\).*give one of these as --text"),
    "no label column": ("a.csv", "review,extra\na,3\n", {},
        r"no column of .* is named as labels are; its columns are review \(text\), extra \(numbers\).* --label none"),
    "no text column": ("a.csv", "name,label\na,3\n", {}, r"named as texts are, and name is not of numbers; .* --text"),
    "no header": ("a.csv", "good film,1\nbad film,0\n", {}, r"1 \(numbers\) \(its first line names them\)"),
    "neither": ("a.csv", "one,two\n1,2\n", {}, r"named as texts or labels are; .* --label none if all are features"),
    "text that is the label": ("a.csv", "text,label\na,b\n", {"text": "label"}, "--text and --label are one column, 'label'"),
    "an unknown label": ("a.csv", "text,label\na,pos\nb,odd\n", {"classes": ("neg", "pos")},
        "the label 'odd' at line 3 of .* is none of the network's classes, neg, pos"),
    "a label beyond the outputs": ("a.csv", "text,label\na,0\nb,2\n", {"classes": ("neg", "pos")},
        r"the label 2 at line 3 of .* is no class of the network, which has 2"),
    "unlabelled samples": ("a.csv", "text,label\na,-1\n", {"classes": ("neg", "pos")}, "the label -1 at line 2"),
    "more names than outputs": ("a.csv", "text,label\na,x\nb,y\nc,z\n", {"classes": ("LABEL_0", "LABEL_1")},
        r"has 3 labels \(x, y, z\), but the network has 2 outputs"),
    "a missing label": ("a.csv", "text,label\na,0\n\nb,\nc,\n", {}, r"'label' of .* is missing at line 4 \(and 1 more\)"),
    "a missing text": ("a.csv", "text,label\n ,0\nb,1\n", {}, "the text 'text' of .* is empty at line 2"),
    "a missing number": ("a.csv", "v,label\n1,0\nNA,1\n", {}, "'v' of .* is 'NA' at line 3, not a number"),
    "an infinite number": ("a.jsonl", '{"v": 1, "y": 0}\n{"v": Infinity, "y": 1}\n', {}, "'v' of .* is inf at line 2"),
    "a huge label": ("a.csv", "v,label\n1,99999999999999999999\n", {}, "the label 99999999999999999999 at line 2.*int64"),
    "an empty file": ("a.csv", "", {}, "is empty"),
    "a header alone": ("a.csv", "text,label\n", {}, "holds no samples"),
    "an empty list": ("a.json", "[]", {}, "holds no samples"),
    "ragged rows": ("a.csv", "text,label\ngood,1\nbad, really,0\n", {}, "has 2 columns .*, but line 3 has 3 fields"),
    "an open quote": ("a.csv", 'text,label\n"open,1\nbad,0\n', {}, "line 2 has 1 field;.*close every quote"),
    "a column twice": ("a.csv", "text,text\na,b\n", {}, "several columns text"),
    "zero bytes": ("a.csv", "text,label\na\0,b\n", {}, "zero bytes"),
    "mixed labels": ("a.json", '[{"text":"a","label":"pos"},{"text":"b","label":1}]', {},
        r"is text at object 0 \('pos'\) and a number at object 1 \(1\); give labels of one kind"),
    "objects": ("a.json", '[{"text":{"a":1},"label":"pos"},{"text":"b","label":"neg"}]', {}, "is an object at object 0"),
    "an object as label": ("a.json", '[{"text":"a","label":{"a":1}}]', {}, "is an object at .*; labels are numbers or names"),
    "ragged label lists": ("a.json", '[{"text":"a","label":[1]},{"text":"b","label":[1,2]}]', {}, "different lengths"),
    "an object of lists": ("a.json", '{"train":[{"text":"a"}]}', {}, "holds an object with train; give a list of objects"),
    "a list of numbers": ("a.json", "[1, 2]", {}, "holds int at object 0"),
    "broken JSON": ("a.jsonl", '{"text": "a"}\n{"text": \n', {}, "line 2 of .* is no JSON"),
    "no Parquet": ("a.parquet", "nothing", {}, "no Parquet file that can be read"),
    "a spreadsheet": ("a.xlsx", "nothing", {}, r"ends in \.xlsx; data are \.npz, \.csv"),
    "a length of zero": ("a.csv", "text,label\na,0\n", {"max_length": 0}, "--max-length must be at least 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_tables_that_leave_something_open_are_refused_in_words(tmp_path: Path, case: str) -> None:
    name, content, options, words = REFUSED[case]
    with pytest.raises(TangentError, match=words):
        load_data(written(tmp_path, name, content), **{"tokenizer": letters, **options})


def test_text_that_is_not_utf_8_is_refused_with_its_line(tmp_path: Path) -> None:
    with pytest.raises(TangentError, match=r"not in UTF-8 \(line 2\)"):
        read(tmp_path, "a.csv", "text,label\ncafé,1\n".encode("latin-1"))


@pytest.mark.parametrize(
    ("tokenizer", "words"),
    [
        (lambda texts: {"input_ids": [[1], [1, 2]]}, "the tokenizer failed on 2 texts"),
        (lambda texts: {"input_ids": torch.zeros(3, 1)}, "must give tensors with a row each"),
        (lambda texts: 1 / 0, "ZeroDivisionError"),
        (lambda texts: {"attention_mask": torch.tensor([[1], [0]])}, r"line 3 of .*a\.csv has no tokens"),
    ],
)  # fmt: skip
def test_tokenizers_that_fail_are_named(tmp_path: Path, tokenizer: Callable[..., Any], words: str) -> None:
    with pytest.raises(TangentError, match=words):
        load_data(written(tmp_path, "a.csv", "text,label\na,0\nbb,1\n"), tokenizer=tokenizer)


def test_labels_in_one_of_two_files_are_refused(tmp_path: Path) -> None:
    held = written(tmp_path, "held.csv", "text\na\n")
    with pytest.raises(TangentError, match=r"a.csv has labels and .*held.csv has none; give labels in both"):
        read(tmp_path, "a.csv", "text,label\nab,b\n", held_out=held)


def test_samples_held_out_must_be_of_the_same_form(tmp_path: Path) -> None:
    held = written(tmp_path, "held.csv", "a,b,label\n1,2,0\n")
    with pytest.raises(TangentError, match="are not of one form; give both in the same shape"):
        read(tmp_path, "a.csv", "a,label\n1,0\n", held_out=held)


def test_categories_of_a_parquet_file_keep_their_order(tmp_path: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="needs pandas")
    pytest.importorskip("pyarrow", reason="needs pyarrow")
    levels = pandas.Categorical(["high", "low", "mid"], categories=["low", "mid", "high"], ordered=True)
    frame = pandas.DataFrame({"text": ["a", "b", "c"], "label": levels}).iloc[[2, 0, 1]]
    frame.to_parquet(tmp_path / "a.parquet")
    data = load_data(tmp_path / "a.parquet", tokenizer=letters)
    assert data.classes == ("low", "mid", "high")
    assert data.y is not None
    assert data.y.tolist() == [1, 2, 0]
    assert told(data, "in the file's own order")


@pytest.mark.parametrize("package", ["pyarrow", "datasets", "PIL.Image", "transformers"])
def test_a_missing_package_is_named_with_what_installs_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    from adaptive_tangents.loading import words

    def missing(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    monkeypatch.setattr(words.importlib, "import_module", missing)
    with pytest.raises(
        TangentError, match=rf"takes {package.partition('.')[0]}; pip install 'adaptive-tangents\[integ"
    ):
        words.optional(package, "reading it", "inspect")
