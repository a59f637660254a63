"""`read_interactions`: forms of files, kinds of values, and every kind of invalid row."""

import bz2
import gzip
import itertools
import json
import lzma
import os
import re
import subprocess
import sys
import textwrap
import warnings
import zipfile

import numpy as np
import pandas as pd
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from keras_rs_contrib import interactions
from keras_rs_contrib.interactions.faults import FIXES, Faults
from keras_rs_contrib.interactions.records import split_records

IDS = {"user_column": "user", "item_column": "item"}
ALL = {**IDS, "rating_column": "rating", "time_column": "time"}
CSV = "user,item,rating,time\nann,Heat,5,30\nbob,Up,3.5,10\nann,Alien,1,20\n"
FRAME = pd.DataFrame(
    {
        "user": ["ann", "bob", "ann"],
        "item": ["Heat", "Up", "Alien"],
        "time": [30, 10, 20],
        "rating": [5.0, 3.5, 1.0],
    }
)


def read(tmp_path, content, **arguments):
    """Reads a file of this content, given as text or bytes."""
    path = tmp_path / "file"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return interactions.read_interactions(path, **(arguments or ALL))


def read_with_faults(tmp_path, content, **arguments):
    """Reads a file with invalid rows. Returns the frame, and the line numbers of invalid rows by kind."""
    with pytest.warns(UserWarning, match="Invalid rows were skipped") as caught:
        frame = read(tmp_path, content, **arguments)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    skipped = frame.attrs["skipped_rows"]
    text = str(caught[0].message)
    for kind, found in skipped.items():
        assert f"{kind}: {found['count']:,} (line" in text
        assert ", ".join(map(str, found["lines"])) in text
    json.dumps(skipped)
    return frame, {kind: found["lines"] for kind, found in skipped.items()}


def zipped(data, names=("file.csv",)):
    import io

    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.mkdir("folder")
        for name in names:
            archive.writestr(name, data)
    return buffer.getvalue()


def zstandard(data):
    sink = pyarrow.BufferOutputStream()
    with pyarrow.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


def parquet(**columns):
    sink = pyarrow.BufferOutputStream()
    pyarrow.parquet.write_table(pyarrow.table(columns), sink)
    return sink.getvalue().to_pybytes()


FORMS = {
    "csv": CSV.encode(),
    "tsv": CSV.replace(",", "\t").encode(),
    "colons": CSV.replace(",", "::").encode(),
    "bars": CSV.replace(",", "|").encode(),
    "semicolons": CSV.replace(",", ";").encode(),
    "recbole": CSV.replace(",", "\t")
    .replace("user\titem\trating\ttime", "user:token\titem:token\trating:float\ttime:float")
    .encode(),
    "parquet": parquet(**{name: FRAME[name].to_numpy() for name in ("user", "item", "rating", "time")}),
    "other columns between": b"n,item,x,time,rating,user\n,Heat,,30,5,ann\n1,Up,2,10,3.5,bob\n,Alien,b,20,1,ann\n",
    "spaces": b" user , item,rating , time\n ann,Heat , 5, 30\nbob ,\tUp,3.5 ,10\nann, Alien,1,20 \n",
    "quotes": b'"user","item","rating","time"\n"ann","Heat","5","30"\n"bob","Up","3.5","10"\n"ann","Alien","1","20"\n',
    "no newline at the end": CSV.encode().removesuffix(b"\n"),
    "empty lines": b"\n \n" + CSV.replace("\n", "\n\n   \n").encode(),
    "Windows": CSV.replace("\n", "\r\n").encode(),
    "old Mac": CSV.replace("\n", "\r").encode(),
    "byte order mark": b"\xef\xbb\xbf" + CSV.encode(),
    "UTF-16": CSV.encode("utf-16"),
    "gzip": gzip.compress(CSV.encode(), mtime=0),
    "bzip2": bz2.compress(CSV.encode()),
    "xz": lzma.compress(CSV.encode()),
    "zip": zipped(CSV.encode()),
    "zstandard": zstandard(CSV.encode()),
}


@pytest.mark.parametrize("form", FORMS)
def test_each_form_of_a_file_gives_the_same_rows(form, tmp_path):
    frame = read(tmp_path, FORMS[form])
    pd.testing.assert_frame_equal(frame, FRAME, check_dtype=False)
    assert [frame[name].dtype.kind for name in frame] == ["O", "O", "i", "f"]
    assert frame.attrs == {"skipped_rows": {}}


@pytest.mark.parametrize("sep", [" ", "^", "%", "\\", "[]", "--", " - ", "::"])
def test_any_separator_can_be_named(sep, tmp_path):
    frame = read(tmp_path, CSV.replace(",", sep), sep=sep, **ALL)
    pd.testing.assert_frame_equal(frame, FRAME, check_dtype=False)


@pytest.mark.parametrize("sep", ["\t", "::", ","])
def test_a_file_without_a_header_needs_names(sep, tmp_path):
    content = "1,5,3,881\n2,5,4,882\n1,7,1,883\n".replace(",", sep)
    names = ["user", "item", "rating", "time"]
    frame = read(tmp_path, content, column_names=names, **ALL)
    assert frame.to_dict("list") == {
        "user": [1, 2, 1],
        "item": [5, 5, 7],
        "time": [881, 882, 883],
        "rating": [3.0, 4.0, 1.0],
    }
    with pytest.raises(ValueError, match=r"'user', and a file with the columns \['1', '5', '3', '881'\]. If its first"):
        read(tmp_path, content)
    # A header that says the same is none of the rows.
    again = read(tmp_path, sep.join(names) + "\n" + content, column_names=names, **ALL)
    pd.testing.assert_frame_equal(again, frame)
    # Another header is an invalid row.
    header = sep.join(["u", "i", "r", "t"]) + "\n"
    again, skipped = read_with_faults(tmp_path, header + content, column_names=names, **ALL)
    assert skipped == {"invalid time": [1]}
    pd.testing.assert_frame_equal(again, frame)
    again, skipped = read_with_faults(tmp_path, header + content, column_names=names, **IDS)
    assert skipped == {"header": [1]}
    pd.testing.assert_frame_equal(again, frame[["user", "item"]])


def test_a_first_row_that_may_be_a_row_stays(tmp_path):
    for content in ("a,b\nc,d\n1,2\n", "a,1\na,2\nb,1\n", "1,2\n3,4\na,5\n", "a,1\n2,2\n3,3\n"):
        assert len(read(tmp_path, content, column_names=["user", "item"], **IDS)) == 3
    # The first line is a header if there are no names.
    assert len(read(tmp_path, "user,item\na,1\n", **IDS)) == 1


def test_the_separator_must_be_clear(tmp_path):
    names = ["user", "item"]
    for content, found in (("1,2|3\n", r"\['|', ','\]"), ("1 2\n", "none")):
        with pytest.raises(ValueError, match=rf"must give 2 fields.*Received: the line .*for which .*{found[-6:]}"):
            read(tmp_path, content, column_names=names, **IDS)
    assert read(tmp_path, "1,2|3\n", column_names=names, sep="|", **IDS)["user"].tolist() == ["1,2"]
    # Other lines decide.
    assert read(tmp_path, "1,2|3\n1|2\n", column_names=names, **IDS)["item"].tolist() == [3, 2]


def test_recbole_columns_are_found_by_both_names(tmp_path):
    content = "user_id:token\titem_id:token\ttime:float\tclass:token_seq\n1\t2\t3\ta b\n"
    frame = read(tmp_path, content, user_column="user_id", item_column="item_id:token", other_columns=["class"])
    assert frame.to_dict("list") == {"user_id": [1], "item_id:token": [2], "class": ["a b"]}
    with pytest.raises(ValueError, match=r"'time:token'.*Did you mean .*'time:float'"):
        read(tmp_path, content, user_column="user_id", item_column="item_id", time_column="time:token")
    with pytest.raises(ValueError, match="two are the same column"):
        read(tmp_path, content, user_column="user_id", item_column="user_id:token")
    with pytest.raises(ValueError, match="'a', which 2 columns have"):
        read(tmp_path, "a:token\ta:float\tb\n1\t2\t3\n", user_column="a", item_column="b")


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["1", "20", "-3"], [1, 20, -3]),
        (["0", "9223372036854775807", "-9223372036854775807"], [0, 2**63 - 1, 1 - 2**63]),
        (["1", "9223372036854775808"], ["1", "9223372036854775808"]),
        (["1", "-9223372036854775808"], ["1", "-9223372036854775808"]),
        (["1", "123456789012345678901234567890"], ["1", "123456789012345678901234567890"]),
        (["007", "7", "07"], ["007", "7", "07"]),
        (["7", "+7"], ["7", "+7"]),
        (["-0", "0"], ["-0", "0"]),
        (["1.0", "2.0"], ["1.0", "2.0"]),
        (["1e3", "5"], ["1e3", "5"]),
        (["1_0", "5"], ["1_0", "5"]),
        (["True", "False"], ["True", "False"]),
        (["true", "a"], ["true", "a"]),
        (["inf", "1"], ["inf", "1"]),
        (["٣", "1"], ["٣", "1"]),
        ([" 5", "6 ", "\t7"], [5, 6, 7]),
        ([" a", "b ", "a"], ["a", "b", "a"]),
        (["\u00a0é", "日本", "🎬"], ["é", "日本", "🎬"]),
        (["\ud7ff", "\ufffd"], ["\ud7ff", "\ufffd"]),
        (['"7"', '"8"'], [7, 8]),
        (['"07"', "8"], ["07", "8"]),
        (['"a,b"', '"c""d"', '"e\nf"'], ["a,b", 'c"d', "e\nf"]),
        (["2020-01-01", "x"], ["2020-01-01", "x"]),
    ],
)
def test_ids_are_integers_only_if_they_are_written_so(texts, expected, tmp_path):
    rows = "".join(f"{text},{text}\n" for text in texts)
    frame = read(tmp_path, "user,item\n" + rows, **IDS)
    for name in IDS.values():
        assert frame[name].tolist() == expected
        assert frame[name].dtype == ("int64" if isinstance(expected[0], int) else pd.Series(["a"]).dtype)
    # With a gap, which pandas would read as floats.
    frame, skipped = read_with_faults(tmp_path, f"user,item\n{rows},1\nNULL,1\n".replace("\n,", "\n ,"), **IDS)
    first = 2 + rows.count("\n")
    assert skipped == {"missing user": [first, first + 1]}
    assert frame["user"].tolist() == expected
    assert frame["item"].tolist() == expected


def test_missing_values_can_be_named(tmp_path):
    content = "user,item\nNA,1\n-,2\nbob,3\nNone,4\nann,NaN\nx,y\n"
    frame, skipped = read_with_faults(tmp_path, content, **IDS)
    assert skipped == {"missing user": [2, 5], "missing item": [6]}
    assert frame["user"].tolist() == ["-", "bob", "x"]
    assert len(read(tmp_path, content, missing_values=(), **IDS)) == 6
    frame, skipped = read_with_faults(tmp_path, content, missing_values=["-"], **IDS)
    assert skipped == {"missing user": [3]}


@pytest.mark.parametrize(
    ("texts", "expected"),
    [
        (["30", "10", "-5"], [30, 10, -5]),
        (["1.5", "1e3", ".5"], [1.5, 1000.0, 0.5]),
        (["1609459200123456789", "1609459200123456790", "x"], [1609459200123456789, 1609459200123456790, None]),
        (["1", "100000000000000000000", "2"], [1.0, 1e20, 2.0]),
        (["1.5", "inf", "nan", "2", "3"], [1.5, None, None, 2.0, 3.0]),
        (["2020-01-31", "2019-12-01", "2020-1-5x"], ["2020-01-31", "2019-12-01", None]),
        (["2020-01-31 10:00:00", "2020-01-31T09:59:59.5"], ["2020-01-31 10:00:00", "2020-01-31 09:59:59.5"]),
        (
            ["2020-01-31T10:00:00Z", "2020-01-31T10:00:00+02:00", "2020-01-31 10:00:00.25-0130"],
            ["2020-01-31 10:00:00Z", "2020-01-31 08:00:00Z", "2020-01-31 11:30:00.25Z"],
        ),
        # One kind of times: the most frequent.
        (["2020-01-31T10:00:00Z", "2020-01-31T10:00:00", "2020-01-31T11:00:00Z"], [0, None, 0]),
        (["2020-01-31T10:00:00", "2020-01-31T10:00:00+01", "2020-01-31T11:00:00"], [0, None, 0]),
        (["20200131", "2020-01-31", "20200201"], [20200131, None, 20200201]),
        (["2020-01-31", "20200131", "2020-02-01"], ["2020-01-31", None, "2020-02-01"]),
        (["1", "", "True", "2", "3"], [1, None, None, 2, 3]),
    ],
)
def test_times(texts, expected, tmp_path):
    content = "user,item,time\n" + "".join(f"a,b,{text}\n" for text in texts)
    if None in expected:
        frame, skipped = read_with_faults(tmp_path, content, time_column="time", **IDS)
        assert skipped == {"invalid time": [line for line, time in enumerate(expected, 2) if time is None]}
    else:
        frame = read(tmp_path, content, time_column="time", **IDS)
    expected = [time for time in expected if time is not None]
    if isinstance(expected[0], str):
        assert frame["time"].tolist() == [pd.Timestamp(time) for time in expected]
        assert frame["time"].dtype.kind == "M"
    elif expected[0]:
        assert frame["time"].tolist() == expected
        assert isinstance(frame["time"].tolist()[0], type(expected[0]))
    assert len(frame) == len(expected)


def test_nanoseconds_stay_where_the_first_date_has_none(tmp_path):
    content = "user,item,time\na,b,2020-01-01T00:00:00Z\na,b,2020-01-01T00:00:00.123456789Z\n"
    frame = read(tmp_path, content, time_column="time", **IDS)
    assert frame["time"][1].nanosecond == 789


@pytest.mark.parametrize(
    ("time_format", "texts", "expected"),
    [
        ("%d/%m/%Y", ["31/01/2020", "01/02/2020", "2020-01-01"], ["2020-01-31", "2020-02-01", None]),
        ("%Y%m%d", ["20200131", "20200201", "20209901"], ["2020-01-31", "2020-02-01", None]),
        ("%Y-%m-%d %H:%M %z", ["2020-01-31 10:00 +0200"], ["2020-01-31 08:00Z"]),
    ],
)
def test_times_of_a_format(time_format, texts, expected, tmp_path):
    content = "user,item,time\n" + "".join(f"a,b,{text}\n" for text in texts)
    arguments = {"time_column": "time", "time_format": time_format, **IDS}
    if None in expected:
        frame, _ = read_with_faults(tmp_path, content, **arguments)
    else:
        frame = read(tmp_path, content, **arguments)
    assert frame["time"].tolist() == [pd.Timestamp(time) for time in expected if time]


def test_ratings_are_finite(tmp_path):
    texts = ["5", "nan", "inf", "-1e2", "", "x", "True", " 2.5 ", "1e999", "0", "3", "4", "5", "6"]
    content = "user,item,rating\n" + "".join(f"a,b,{text}\n" for text in texts)
    frame, skipped = read_with_faults(tmp_path, content, rating_column="rating", **IDS)
    assert frame["rating"].tolist() == [5.0, -100.0, 2.5, 0.0, 3.0, 4.0, 5.0, 6.0]
    assert skipped == {"invalid rating": [3, 4, 6, 7, 8]}
    assert frame.attrs["skipped_rows"]["invalid rating"]["count"] == 6
    with pytest.raises(ValueError, match="Most rows of a file must be valid"):
        read(tmp_path, "user,item,rating\na,b,True\na,b,False\n", rating_column="rating", **IDS)


def test_other_columns_may_miss_values(tmp_path):
    content = "user,item,age,title,x\na,b,5,NA,\nc,NAN,,Heat,\n"
    frame = read(tmp_path, content, other_columns=["title", "age"], **IDS)
    assert list(frame) == ["user", "item", "title", "age"]
    assert frame["item"].tolist() == ["b", "NAN"]
    assert frame["age"].tolist()[0] == 5
    assert frame.isna().to_numpy().tolist() == [[False, False, True, False], [False, False, False, True]]


def test_each_kind_of_invalid_row_is_counted_with_its_lines(tmp_path):
    good = [b"u%d,i%d,4,%d" % (number, number, number) for number in range(14)]
    faults = {
        3: (b"u,i,4", "too few fields"),
        5: (b"u,i,4,1,2", "too many fields"),
        6: (b",i,4,1", "missing user"),
        8: (b"u, ,4,1", "missing item"),
        9: (b"u,i,4,soon", "invalid time"),
        10: (b"u,i,good,1", "invalid rating"),
        12: (b"u\xff,i,4,1", "undecodable text"),
        13: (b"u\x00,i,4,1", "undecodable text"),
        15: (b'u,"i,4,1', "invalid quotes"),
        17: (b"u,i,NaN,1", "invalid rating"),
        # The first kind counts.
        18: (b",,bad,bad", "missing user"),
    }
    lines = [b"user,item,rating,time"]
    for number in range(2, len(good) + len(faults) + 2):
        lines.append(faults[number][0] if number in faults else good.pop(0))
    frame, skipped = read_with_faults(tmp_path, b"\n".join(lines))
    expected = {}
    for number, (_, kind) in faults.items():
        expected.setdefault(kind, []).append(number)
    assert skipped == expected
    assert set(expected) == set(FIXES) - {"header"}
    assert frame["user"].tolist() == [f"u{number}" for number in range(14)]
    assert frame["rating"].tolist() == [4.0] * 14
    assert frame["time"].tolist() == list(range(14))
    assert frame.index.tolist() == list(range(14))


def test_repeated_headers_do_not_turn_ids_into_strings(tmp_path):
    part = "user,item,rating,time\n1,2,3,4\n5,6,7,8\n"
    frame, skipped = read_with_faults(tmp_path, part + part)
    assert frame["user"].tolist() == [1, 5, 1, 5]
    assert skipped == {"invalid time": [4]}


def test_only_the_first_lines_are_reported(tmp_path):
    content = "user,item\n" + "a,b\n,b\n" * 1_000
    frame, _ = read_with_faults(tmp_path, content, **IDS)
    assert frame.attrs["skipped_rows"] == {"missing user": {"count": 1_000, "lines": [3, 5, 7, 9, 11]}}
    assert len(frame) == 1_000


@pytest.mark.parametrize(
    ("content", "users", "items", "skipped"),
    [
        # Quotes within a field that does not begin with one are part of it.
        ('a,5" disk\nb,"x,y"\nc,d\n', ["a", "b", "c"], ['5" disk', "x,y", "d"], {}),
        ('a,"b\nc,"d"\ne,f\n', ["c", "e"], ["d", "f"], {"invalid quotes": [2]}),
        ('a,"b\nc,d\ne,"f\ng,h\ni,j\n', ["c", "g", "i"], ["d", "h", "j"], {"invalid quotes": [2, 4]}),
        ('a,"b"x\nc,"d\ne"\nf,g\nh,5"\n', ["c", "f", "h"], ["d\ne", "g", '5"'], {"invalid quotes": [2]}),
        ('a,"b\n""c""\nd"\ne,\'f\'\ng,"\n', ["a", "e"], ['b\n"c"\nd', "'f'"], {"invalid quotes": [6]}),
        ('a,b"\nc,"d\n\ne"\nf\n', ["a", "c"], ['b"', "d\n\ne"], {"too few fields": [6]}),
        ('a,"b,c\nd"\ne\nf,g\n', ["a", "f"], ["b,c\nd", "g"], {"too few fields": [4]}),
        (f'"{"a" * 200_000}",b\n', ["a" * 200_000], ["b"], {}),
    ],
)
def test_quotes(content, users, items, skipped, tmp_path):
    if skipped:
        frame, found = read_with_faults(tmp_path, "user,item\n" + content, **IDS)
        assert found == skipped
    else:
        frame = read(tmp_path, "user,item\n" + content, **IDS)
    assert frame["user"].tolist() == users
    assert frame["item"].tolist() == items


def test_quotes_may_have_no_meaning(tmp_path):
    frame = read(tmp_path, 'user\titem\n"a\t"b" c\nd"\te"\n', quote_char=None, **IDS)
    assert frame.to_numpy().tolist() == [['"a', '"b" c'], ['d"', 'e"']]
    frame = read(tmp_path, "user,item\n'a,b',c\n", quote_char="'", **IDS)
    assert frame.to_numpy().tolist() == [["a,b", "c"]]
    frame = read(tmp_path, 'user::item\n"a::"b\n', **IDS)
    assert frame.to_numpy().tolist() == [['"a', '"b']]


@pytest.mark.parametrize("quote", [b"", b'"'])
def test_the_bounds_of_fields_are_right_where_rows_were_left_out(quote):
    lines = [b"a,bb,", b"c", b"", b",d,ee", b"f,g,h,i", b"x\0,y,z", b"jj,,k"]
    if quote:
        lines[3:3] = [b'"l,"",\nm",nn,', b'n,"o,p', b'q,r",s', b"n,o,p"]
    faults = Faults("file")
    found = split_records(b"\n".join(lines) + b"\n", b",", 3, quote, 10, faults)
    fields = [[found.text[begin + 1 : end] for begin, end in itertools.pairwise(bounds)] for bounds in found.bounds]
    expected = [line.rsplit(b",", 2) for line in lines if line.count(b",") == 2]
    if quote:
        expected[1:3] = [[b'"l,"",\nm"', b"nn", b""], [b"n", b'"o,p\nq,r"', b"s"]]
    assert fields == [each for each in expected if b"\0" not in each[0]]
    numbers = [10, 13, 15, 17, 18, 21] if quote else [10, 13, 16]
    assert found.line_numbers.tolist() == numbers


FIELDS = st.text(st.sampled_from('ab",\n 5'), max_size=4)


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.tuples(FIELDS, FIELDS), min_size=1, max_size=6), quote_all=st.booleans())
def test_what_pandas_writes_comes_back(rows, quote_all, tmp_path):
    rows = [(f"u{user}", f"i{item}") for user, item in rows]
    text = pd.DataFrame(rows, columns=["user", "item"]).to_csv(index=False, quoting=1 if quote_all else 0)
    frame = read(tmp_path, text, **IDS)
    assert frame.to_numpy().tolist() == [[user.strip(), item.strip()] for user, item in rows]


@settings(
    max_examples=100, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(lines=st.lists(st.text(st.sampled_from('ab",'), max_size=12), max_size=8))
def test_a_broken_row_costs_no_good_row(lines, tmp_path):
    """Between any lines without a quote, good rows are found, and each row is either returned or reported."""
    text = "user,item\n" + "".join(f"{line}\ngood,row{place}\n" for place, line in enumerate(lines)) + "z,z\n" * 20
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        frame = read(tmp_path, text, **IDS)
    found = set(frame["item"])
    open_quotes = any('"' in line for line in lines)
    assert open_quotes or found >= {f"row{place}" for place in range(len(lines))}
    skipped = sum(each["count"] for each in frame.attrs["skipped_rows"].values())
    num_rows = len(text.split("\n")) - 2 - sum(not line for line in lines)
    assert open_quotes or len(frame) + skipped == num_rows


def test_the_encoding_is_named_or_rejected(tmp_path):
    content = "user,item\nJosé,é\nann,b\n".encode("latin-1")
    assert read(tmp_path, content, encoding="latin-1", **IDS)["user"].tolist() == ["José", "ann"]
    frame, skipped = read_with_faults(tmp_path, content, **IDS)
    assert skipped == {"undecodable text": [2]}
    assert frame["user"].tolist() == ["ann"]
    with pytest.warns(UserWarning, match=re.escape(repr(r"Jos\xe9,\xe9"))):
        read(tmp_path, content, **IDS)
    with pytest.raises(ValueError, match=r"Python knows. Received: encoding='utf8000'"):
        read(tmp_path, content, encoding="utf8000", **IDS)
    with pytest.raises(ValueError, match=r"must be that of the file. Received: encoding='utf-16'"):
        read(tmp_path, content[:-1] if len(content) % 2 == 0 else content, encoding="utf-16", **IDS)


TIMES = pd.to_datetime(["2020-01-02", "2020-01-01"])


@pytest.mark.parametrize(
    ("user", "expected"),
    [
        (pyarrow.array([1, 2], "int32"), [1, 2]),
        (pyarrow.array([1, 2], "uint64"), [1, 2]),
        (pyarrow.array([1, 2**64 - 1], "uint64"), [1, 2**64 - 1]),
        (pyarrow.array([2**60 + 1, None, 5]), [2**60 + 1, 5]),
        (pyarrow.array([1.0, None, 3.0]), [1, 3]),
        (pyarrow.array(["007", "7"]), ["007", "7"]),
        (pyarrow.array(["7", "8"]), ["7", "8"]),
        (pyarrow.array([" a", None, "b", ""]), ["a", "b"]),
        (pyarrow.array([b"a", "é".encode()]), ["a", "é"]),
        (pyarrow.array(["a", "b", "a"]).dictionary_encode(), ["a", "b", "a"]),
    ],
)
def test_ids_of_parquet_keep_their_kind(user, expected, tmp_path):
    content = parquet(user=user, item=[1] * len(user))
    if len(user) > len(expected):
        with pytest.warns(UserWarning, match=r"missing user: . \(rows? 2"):
            frame = read(tmp_path, content, **IDS)
    else:
        frame = read(tmp_path, content, **IDS)
    assert frame["user"].tolist() == expected
    assert frame["item"].tolist() == [1] * len(expected)


@pytest.mark.parametrize(
    ("time", "expected"),
    [
        (pyarrow.array([5, None, 3]), [5, 3]),
        (pyarrow.array([0.5, None, float("nan"), 1.5, 2.5]), [0.5, 1.5, 2.5]),
        (pyarrow.array(["2020-01-02", "2020-01-01"]), TIMES),
        (pyarrow.array(TIMES), TIMES),
        (pyarrow.array(TIMES).cast("date32"), TIMES),
        (pyarrow.array(TIMES).cast(pyarrow.timestamp("ms", "Europe/Rome")), TIMES.tz_localize("UTC")),
    ],
)
def test_times_of_parquet(time, expected, tmp_path):
    content = parquet(user=[1] * len(time), item=[1] * len(time), time=time, rating=[1.5] * len(time))
    with warnings.catch_warnings():
        if len(time) > len(expected):
            warnings.simplefilter("ignore")
        frame = read(tmp_path, content)
    assert frame["time"].tolist() == list(expected)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user": [1.5]}, "must be strings or integers. Received: 1.5 in the column 'user'"),
        ({"user": [True]}, "must suit its use. Received: the user column 'user' of type bool"),
        ({"item": [[1]]}, "must suit its use. Received: the item column 'item' of type list"),
        ({"rating": TIMES[:1]}, "must suit its use. Received: the rating column 'rating' of type timestamp"),
        ({"time": [True]}, "must suit its use. Received: the time column 'time' of type bool"),
        ({"user": [b"\xff"]}, "must be UTF-8. Received: 'user'"),
        ({"user": pyarrow.array([None], "string")}, "Most rows"),
    ],
)
def test_invalid_columns_of_parquet_raise(columns, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, parquet(**{"user": [1], "item": [1], "time": [1], "rating": [1], **columns}))


def test_parquet_has_its_own_names(tmp_path):
    with pytest.raises(ValueError, match=r"'user', and a file with the columns .*'User'.*Did you mean 'User'"):
        read(tmp_path, parquet(User=[1], item=[1]), **IDS)
    for arguments in ({"sep": ","}, {"column_names": ["user", "item"]}):
        with pytest.raises(ValueError, match=r"are for text. Received: a Parquet file"):
            read(tmp_path, FORMS["parquet"], **arguments, **IDS)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "must have rows. Received: .*, which is empty"),
        (b" \n\n", "must have rows. Received: .*, which is empty"),
        (b"user,item,rating,time\n", "has a header and no rows"),
        (b"user,item,rating,time\n\n", "has a header and no rows"),
        (b"user,item,rating,time\n,,,\n", r"1 of 1 rows of .* are invalid:\n  missing user: 1 \(line 2\), such as ''"),
        (
            b"user,item,rating,time\na,b,1,1\na,b\nc,d\n",
            r"too few fields: 2 \(lines 3, 4\), such as 'a,b'. Check `sep`",
        ),
        (b"userId,item,rating,time\na,b,1,1\n", r"Received: 'user', .*\['userId', 'item', 'rating', .*mean 'userId'"),
        (b"users/items\na,b,1,1\n", r"If something else separates its fields, pass `sep`. .*'users/items'"),
        (b"a,b,c,d\ne,f,g,h\n", "Pass one of them"),
        (bytes(range(256)) * 20, "Received: 'user', and a file with the columns"),
        (gzip.compress(CSV.encode(), mtime=0)[:-12], "must be whole. Received"),
        (b"BZh9 not", "must be whole. Received"),
        (b"PK\x03\x04 not", "must be whole. Received"),
        (zipped(b"", ["a.csv", "b.csv"]), r"must contain one file. Received: 2 files, \['a.csv', 'b.csv'\]"),
    ],
)
def test_invalid_files_raise(content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read(tmp_path, content)


def test_missing_files_raise(tmp_path):
    (tmp_path / "ratings.csv").write_text(CSV)
    with pytest.raises(FileNotFoundError, match=r"rating.csv', which is not in .*Did you mean 'ratings.csv'\?"):
        interactions.read_interactions(tmp_path / "rating.csv", **IDS)
    with pytest.raises(FileNotFoundError, match="Check the path"):
        interactions.read_interactions(str(tmp_path / "no" / "file.csv"), **IDS)
    with pytest.raises(IsADirectoryError, match="Received: the folder"):
        interactions.read_interactions(tmp_path, **IDS)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"item_column": "user"}, ValueError, "has one use"),
        ({"other_columns": ["time", "time"]}, ValueError, "has one use"),
        ({"other_columns": "time"}, TypeError, r"list of names. Received: 'time'. Pass \['time'\]"),
        ({"user_column": 0}, TypeError, "named by a string. Received: 0 for the user column"),
        ({"sep": ""}, ValueError, "`sep` must be"),
        ({"sep": "§"}, ValueError, "`sep` must be"),
        ({"sep": "\n"}, ValueError, "`sep` must be"),
        ({"quote_char": ""}, ValueError, "`quote_char` must be"),
        ({"quote_char": ",", "sep": ","}, ValueError, "`quote_char` must be"),
        ({"column_names": ["user"]}, ValueError, "`column_names` must be"),
        ({"column_names": ["user", "user"]}, ValueError, "`column_names` must be"),
        ({"column_names": "user"}, ValueError, "`column_names` must be"),
        ({"column_names": ["user", "b", "c", "d"]}, ValueError, "'item', and a file with the columns"),
    ],
)
def test_invalid_arguments_raise(arguments, error, message, tmp_path):
    with pytest.raises(error, match=message):
        read(tmp_path, CSV, **{**IDS, **arguments})


def test_importing_the_package_needs_no_pandas():
    script = """
        import importlib.abc, sys

        class NoPandas(importlib.abc.MetaPathFinder):
            def find_spec(self, name, path, target=None):
                if name.partition(".")[0] == "pandas":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)

        sys.meta_path.insert(0, NoPandas())
        import keras_rs_contrib
        assert "keras_rs_contrib.interactions" not in sys.modules
        from keras_rs_contrib import interactions
    """
    environment = {**os.environ, "KERAS_BACKEND": "jax"}
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 1
    assert "ImportError: `keras_rs_contrib.interactions` needs pandas." in result.stderr
    assert 'pip install "keras_rs_contrib[data]"' in result.stderr


def test_the_example_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {}
    exec(interactions.__doc__.split("```python\n")[1].split("```")[0], namespace)
    assert namespace["test"]["movie"].tolist() == ["Alien", "Alien"]
    assert namespace["history"][1].tolist() == [None] * 9 + ["Heat"]
    assert namespace["latest"].tolist() == [[None] * 7 + ["Heat", "Up", "Alien"], [None] * 8 + ["Heat", "Alien"]]
    assert all(getattr(interactions, name).__doc__ for name in interactions.__all__)


def test_a_file_feeds_a_vocabulary(tmp_path):
    from keras_rs_contrib import Vocabulary

    frame = read(tmp_path, CSV)
    rows = Vocabulary.from_data(frame["item"]).encode(frame["item"])
    history = interactions.histories(frame["user"], rows, frame["time"], 2)
    assert history.tolist() == [[-1, 3], [-1, -1], [-1, -1]]
    np.testing.assert_array_equal(rows, [1, 2, 3])
