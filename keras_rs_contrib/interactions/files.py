"""Files of text: found, decompressed and decoded."""

from __future__ import annotations

import bz2
import codecs
import difflib
import gzip
import io
import lzma
import os
import pathlib
import zipfile
import zlib

PARQUET = b"PAR1"
_BOMS = {codecs.BOM_UTF8: "utf-8", codecs.BOM_UTF16_LE: "utf-16", codecs.BOM_UTF16_BE: "utf-16"}
_DAMAGED = (EOFError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, zipfile.BadZipFile, OSError, RuntimeError)


def read_bytes(path: str | os.PathLike[str]) -> bytes:
    """Returns the content of a file, decompressed if its first bytes are those of a compressed file.

    Raises:
        FileNotFoundError: with names in the folder that are close to that of the file.
        ValueError: if the file is damaged, or an archive of several files.
    """
    place = pathlib.Path(path).expanduser()
    if place.is_dir():
        raise IsADirectoryError(f"`path` must be a file. Received: the folder {str(place)!r}. Pass a file in it.")
    if not place.exists():
        names = os.listdir(place.parent) if place.parent.is_dir() else []
        close = difflib.get_close_matches(place.name, names, n=3)
        fix = f"Did you mean {' or '.join(map(repr, close))}?" if close else "Check the path."
        raise FileNotFoundError(
            f"`path` must be a file. Received: {str(place)!r}, which is not in {str(place.parent.absolute())!r}. {fix}"
        )
    data = place.read_bytes()
    for magic, decompress in _FORMATS.items():
        if data.startswith(magic):
            try:
                return decompress(data)
            except _DAMAGED as error:
                raise ValueError(
                    f"A compressed file must be whole. Received: {str(place)!r}, which does not decompress: {error} "
                    "Download or write it again."
                ) from error
    return data


def _unzip(data: bytes) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        names = [info.filename for info in archive.infolist() if not info.is_dir()]
        names = [name for name in names if not name.startswith("__MACOSX/")]
        if len(names) != 1:
            raise ValueError(
                f"A zip archive must contain one file. Received: {len(names)} files, {names[:20]}. Unpack it, and pass "
                "one of them."
            )
        return archive.read(names[0])


def _decompress_zstandard(data: bytes) -> bytes:
    try:
        import pyarrow
    except ModuleNotFoundError as error:
        raise ImportError(
            "A Zstandard file needs pyarrow. Received: no module 'pyarrow'. Install it: "
            'pip install "keras_rs_contrib[data]".'
        ) from error
    content: bytes = pyarrow.CompressedInputStream(io.BytesIO(data), "zstd").read()
    return content


_FORMATS = {
    b"\x1f\x8b": gzip.decompress,
    b"BZh": bz2.decompress,
    b"\xfd7zXZ\x00": lzma.decompress,
    b"PK\x03\x04": _unzip,
    b"\x28\xb5\x2f\xfd": _decompress_zstandard,
}


def as_utf8(data: bytes, encoding: str) -> bytes:
    r"""Returns text as UTF-8 with `\n` at the end of each line, and without a byte order mark.

    What cannot be decoded becomes the bytes of lone surrogates, which valid UTF-8 never contains: `is_undecodable`.

    Args:
        data: text in `encoding`, or in that of its byte order mark.
        encoding: a name that Python knows.

    Raises:
        ValueError: if there is no such encoding, or if it cannot skip what it cannot decode.
    """
    encoding = next((name for mark, name in _BOMS.items() if data.startswith(mark)), encoding)
    try:
        name = codecs.lookup(encoding).name
    except LookupError as error:
        raise ValueError(
            f"`encoding` must be one that Python knows. Received: encoding={encoding!r}. Pass 'utf-8' or 'latin-1', "
            "for instance."
        ) from error
    if name == "utf-8":
        data = data.removeprefix(codecs.BOM_UTF8)
    if not (name == "utf-8" and data.isascii()):
        try:
            text = data.decode(name)
            data = data if name == "utf-8" else text.encode()
        except UnicodeDecodeError:
            try:
                data = data.decode(name, "surrogateescape").encode("utf-8", "surrogatepass")
            except UnicodeDecodeError as error:
                raise ValueError(
                    f"`encoding` must be that of the file. Received: encoding={encoding!r}, and {error}. Pass another."
                ) from error
    if b"\r" in data:
        data = data.replace(b"\r\n", b"\n")
        if b"\n" not in data:
            # As Mac OS 9 wrote files.
            data = data.replace(b"\r", b"\n")
    return data if data.endswith(b"\n") or not data else data + b"\n"
