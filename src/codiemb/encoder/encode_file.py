"""The texts of a file -> their embeddings in a file, a chunk at a time: memory does not grow with the file.

Under torchrun every rank calls in: the first reads a chunk and writes it, and all encode their share of it.

input                                         texts
.jsonl .json .csv .tsv [.gz .zst], .parquet   the columns asked for, joined by a space
any other [.gz .zst]                          one a line

output        holds
.npy          float32 [text, dim]
.parquet      `embedding`, a list of float32 of fixed size; and `id` if a row of the first chunk has
              `_id` or `id`, null where one has none
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from jaxtyping import Float
from numpy.lib import format as npy
from sentence_transformers import SentenceTransformer
from torch import Tensor
from tqdm.auto import tqdm

from codiemb.config import Role, Source
from codiemb.data.readers import FILE_FORMATS, file_format, read_lines, read_rows
from codiemb.distributed import on_first, rank
from codiemb.encoder.engine import encode_on_all_ranks
from codiemb.encoder.model import max_length, prompt
from codiemb.encoder.tokens import Text
from codiemb.errors import ConfigError, DataError, short
from codiemb.files import replacing, require_folder, sync, told_of_full_disk

CHUNK = 8192  # texts encoded at once: enough of like length to fill micro-batches
OUTPUTS = (".npy", ".parquet")
Item = tuple[str, str | None]  # a text and its id
Rows = Float[np.ndarray, "text dim"]


def encode_file(
    encoder: SentenceTransformer,
    input: Path,
    output: Path,
    *,
    columns: Sequence[str] = ("text",),
    role: Role = "document",
    bf16: bool = False,
) -> int:
    """Writes the L2-normalised embeddings in the order of the input; returns how many.

    Args:
        columns: of the text, in structured input; empty ones are left out.
        role: whose prompt and length are used.

    Raises:
        DataError: on every rank: a line or row that holds no text, with its number; and there is no output then.
    """
    before, length = prompt(encoder, role), max_length(encoder, role)
    texts = read_texts(input, columns)
    chunks = iter(lambda: on_first(lambda: list(islice(texts, CHUNK))), [])
    first = next(chunks, None)
    if first is None:
        raise DataError(f"file {input}", got="no text", expected="at least one")
    count = 0
    told = told_of_full_disk(output.parent, "free some disk")
    with (
        tqdm(desc=f"encode {input.name}", unit="text", leave=False, disable=rank() > 0) as bar,
        contextlib.ExitStack() as stack,
    ):
        if rank() == 0:
            writer = told(stack.enter_context)(_written(output))

        @told
        def write(chunk: list[Item], embeddings: Tensor) -> None:
            writer.add(embeddings.float().cpu().numpy(), [key for _, key in chunk])

        for chunk in chain([first], chunks):
            embeddings = encode_on_all_ranks(encoder, [Text(text, before, length) for text, _ in chunk], bf16=bf16)
            on_first(partial(write, chunk, embeddings))
            count += len(chunk)
            bar.update(len(chunk))
        on_first(told(stack.close))
    return count


@contextlib.contextmanager
def _written(output: Path) -> Iterator[NumpyFile | ParquetFile]:
    """What writes `output`, which has its name when it is whole."""
    with replacing(output) as unfinished:
        with (
            unfinished.open("wb") as file,
            contextlib.closing((NumpyFile if output.suffix == ".npy" else ParquetFile)(file)) as writer,
        ):
            yield writer
        sync(unfinished)


def require_output(output: Path, input: Path) -> None:
    """Refuses an output that cannot be written, before anything is encoded.

    Raises:
        ConfigError: another suffix than .npy or .parquet, the input itself, or a folder that cannot be written.
    """
    if output.suffix not in OUTPUTS:
        raise ConfigError(f"--output {output}", got=repr(output.suffix), expected=f"one of {', '.join(OUTPUTS)}")
    if output.is_dir() or output.resolve() == input.resolve():
        got = "a folder" if output.is_dir() else "the input"
        raise ConfigError(f"--output {output}", got=got, expected="a file to write")
    require_folder("--output", output.parent)
    output.parent.mkdir(parents=True, exist_ok=True)


def read_texts(path: Path, columns: Sequence[str]) -> Iterator[Item]:
    """The texts of a file with their ids (None where there is none), read as they are asked for."""
    if not path.is_file():
        raise DataError(f"--input {path}", got="no such file", expected="a file of texts", fix="check the path")
    if file_format(path) not in FILE_FORMATS:
        for _, line in read_lines(path):
            yield line.rstrip("\r\n"), None
    else:
        for where, row in read_rows(Source(name="input", task="retrieval", path=str(path))):
            yield _item(row, where, columns)


def _item(row: dict[str, Any], where: str, columns: Sequence[str]) -> Item:
    parts = []
    for column in columns:
        if column not in row:
            listed = ", ".join(str(name)[:60] for name in list(row)[:12]) or "none"
            raise DataError(f"{where}, {column}", got="no such column", expected=f"one of {listed} after --column")
        if row[column] is not None and not isinstance(row[column], str):
            raise DataError(f"{where}, {column}", got=short(row[column]), expected="a text")
        parts.append(row[column])
    if all(part is None for part in parts):
        raise DataError(f"{where}, {columns[0]}", got="no text", expected="a text")
    key = row["_id"] if row.get("_id") is not None else row.get("id")
    return " ".join(filter(None, parts)), str(key) if key is not None else None


class NumpyFile:
    """Writes an array whose number of rows is known at the end."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.rows, self.dim = file, 0, 0

    def add(self, embeddings: Rows, ids: Sequence[str | None]) -> None:
        if not self.rows:
            self.dim = embeddings.shape[1]
            self._header()
        self.file.write(np.ascontiguousarray(embeddings, dtype="<f4").tobytes())
        self.rows += len(embeddings)

    def close(self) -> None:
        self.file.seek(0)
        self._header()  # NumPy leaves room in it for the rows to become more

    def _header(self) -> None:
        npy.write_array_header_1_0(self.file, {"descr": "<f4", "fortran_order": False, "shape": (self.rows, self.dim)})


class ParquetFile:
    """Writes a row group for each chunk."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file = file
        self.writer: pq.ParquetWriter | None = None

    def add(self, embeddings: Rows, ids: Sequence[str | None]) -> None:
        if self.writer is None:
            vector = pa.field("embedding", pa.list_(pa.float32(), embeddings.shape[1]))
            with_ids = any(key is not None for key in ids)
            self.schema = pa.schema([pa.field("id", pa.string()), vector] if with_ids else [vector])
            self.writer = pq.ParquetWriter(self.file, self.schema)
        elif "id" not in self.schema.names and (late := next((key for key in ids if key is not None), None)):
            raise DataError(
                "--input", got=f"the id {short(late)}", expected=f"none, as the first {CHUNK} texts have none"
            )
        column = pa.FixedSizeListArray.from_arrays(pa.array(embeddings.ravel()), embeddings.shape[1])
        columns = [pa.array(ids, pa.string()), column] if "id" in self.schema.names else [column]
        self.writer.write_batch(pa.record_batch(columns, schema=self.schema))

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()
