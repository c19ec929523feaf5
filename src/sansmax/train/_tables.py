"""Tables of predictions on disk, CSV or Parquet: one file a part, then all parts in one."""

import csv
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["FORMATS", "Columns", "Rows", "first_row", "format_of"]

ROWS = 4096  # of a row group of Parquet
Rows = list[dict[str, Any]]


@dataclass(frozen=True)
class Columns:
    """path, top1, top1_probability, ... to top_k, error, and an embedding where one is wanted."""

    top_k: int
    embeddings: bool

    def names(self) -> list[str]:
        """In their order."""
        top = [name for i in range(1, self.top_k + 1) for name in (f"top{i}", f"top{i}_probability")]
        return ["path", *top, "error", *(["embedding"] if self.embeddings else [])]


def format_of(out: Path) -> Any:
    """What writes and joins files with that ending.

    Raises:
        ValueError: another ending, or Parquet without pyarrow.
    """
    if out.suffix not in FORMATS:
        raise ValueError(f"out: expected a file that ends in {' or '.join(FORMATS)}, got {out}; rename it")
    if out.suffix == ".parquet":
        try:
            import pyarrow  # noqa: F401
        except ImportError:
            raise ValueError(
                f"out: expected pyarrow to be installed for {out}, got none; pip install sansmax[data], or "
                f"write a .csv"
            ) from None
    return FORMATS[out.suffix]


def first_row(path: Path) -> dict[str, Any]:
    """Of a table that is not empty."""
    return format_of(path).first(path)


class Csv:
    """UTF-8 with a header; an embedding is one column of numbers with spaces between."""

    @staticmethod
    def write(path: Path, columns: Columns, batches: Iterable[Rows]) -> None:
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, columns.names(), lineterminator="\n")
            writer.writeheader()
            for rows in batches:
                for row in rows:
                    if row.get("embedding") is not None:
                        row = row | {"embedding": " ".join(map(str, row["embedding"]))}
                    writer.writerow(row)

    @staticmethod
    def join(path: Path, columns: Columns, parts: Iterable[Path]) -> tuple[int, int]:
        csv.field_size_limit(2**31 - 1)  # an embedding is one field
        images = errors = 0
        with path.open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow(columns.names())
            error = columns.names().index("error")
            for part in parts:
                with part.open(encoding="utf-8", newline="") as source:
                    reader = csv.reader(source)
                    next(reader)
                    for row in reader:
                        writer.writerow(row)
                        images, errors = images + 1, errors + bool(row[error])
        return images, errors

    @staticmethod
    def first(path: Path) -> dict[str, Any]:
        csv.field_size_limit(2**31 - 1)
        with path.open(encoding="utf-8", newline="") as file:
            return next(csv.DictReader(file))


class Parquet:
    """Strings, float32, and list<float32> for an embedding; zstd."""

    @staticmethod
    def write(path: Path, columns: Columns, batches: Iterable[Rows]) -> None:
        import pyarrow as pa

        schema = _schema(columns)
        with _writer(path, columns) as writer:
            for rows in _grouped(batches):
                writer.write_table(pa.Table.from_pylist(rows, schema))

    @staticmethod
    def join(path: Path, columns: Columns, parts: Iterable[Path]) -> tuple[int, int]:
        import pyarrow.parquet as pq

        images = errors = 0
        with _writer(path, columns) as writer:
            for part in parts:
                with pq.ParquetFile(part) as file:
                    for batch in file.iter_batches(ROWS):
                        writer.write_batch(batch)
                        images += batch.num_rows
                        errors += batch.num_rows - batch.column("error").null_count
        return images, errors

    @staticmethod
    def first(path: Path) -> dict[str, Any]:
        import pyarrow.parquet as pq

        with pq.ParquetFile(path) as file:
            return next(file.iter_batches(1)).to_pylist()[0]


def _schema(columns: Columns) -> Any:
    import pyarrow as pa

    kinds = {"embedding": pa.list_(pa.float32())}
    return pa.schema(
        [
            (name, kinds.get(name, pa.float32() if name.endswith("probability") else pa.string()))
            for name in columns.names()
        ]
    )


def _writer(path: Path, columns: Columns) -> Any:
    import pyarrow.parquet as pq

    return pq.ParquetWriter(path, _schema(columns), compression="zstd")


def _grouped(batches: Iterable[Rows]) -> Iterator[Rows]:
    """Batches put together to row groups."""
    rows: Rows = []
    for batch in batches:
        rows += batch
        if len(rows) >= ROWS:
            yield rows
            rows = []
    if rows:
        yield rows


FORMATS: dict[str, Any] = {".csv": Csv, ".parquet": Parquet}
