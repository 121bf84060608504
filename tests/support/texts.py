"""Documents as files."""

import gzip
import json

import pyarrow
import pyarrow.parquet


def save(path, documents, field="text"):
    """Writes documents in the format that the name asks for."""
    records = [{"id": index, field: document} for index, document in enumerate(documents)]
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), path, row_group_size=2)
        return path
    text = "".join(json.dumps(record) + "\n" for record in records) if ".json" in path.name else documents[0]
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path
