"""Tables of any kind as rows: CSV, TSV, JSON lines and Parquet, by one reader for every path."""

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..utils.config import ConfigError
from ..utils.files import parse_row


def load_pyarrow(where: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ConfigError(f'{where}: parquet needs pyarrow: pip install "hierarchical-diffusion-rlhf-caption-refinement[data]"') from None
    return pyarrow.parquet


def read_table(path: Path) -> Iterator[tuple[int, dict[str, Any] | None]]:
    """(line, row) of a table, of Parquet without columns that hold bytes; None for a line that is not a JSON object in UTF-8."""
    suffix = path.suffix.lower()
    if suffix in (".csv", ".tsv"):
        with path.open(encoding="utf-8-sig", newline="") as lines:
            reader = csv.DictReader(lines, delimiter="\t" if suffix == ".tsv" else ",")
            yield from ((reader.line_num, row) for row in reader)
    elif suffix == ".parquet":
        file = load_pyarrow(path).ParquetFile(path)
        columns = [field.name for field in file.schema_arrow if "binary" not in str(field.type)]
        groups = (file.read_row_group(group, columns).to_pylist() for group in range(file.num_row_groups))
        yield from enumerate((row for rows in groups for row in rows), 1)
    else:
        with path.open("rb") as lines:
            yield from ((number, parse_row(line)) for number, line in enumerate(lines, 1) if line.strip())
