"""Makes a data set for ``tfds:NAME@DIR`` from text files.

``python -m optima_tpu.data.build NAME@DIR FILE...`` writes what TFDS itself would: DIR/NAME/1.0.0 with an array_record file for
every split, dataset_info.json and features.json. It does not use TFDS's ``GeneratorBasedBuilder``, which holds a split in
memory, and needs TensorFlow beyond 1 GB.
"""

import argparse
import contextlib
import functools
import math
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TextColumn, TimeElapsedColumn

from optima_tpu.data.file import File
from optima_tpu.data.tfds import TFDS
from optima_tpu.errors import UserError, plural
from optima_tpu.runtime import command, signals
from optima_tpu.runtime.bounds import Bound
from optima_tpu.runtime.program import Parser, program

VERSION = "1.0.0"


def build(
    target: TFDS,
    files: Sequence[File],
    validation_files: Sequence[File] = (),
    validation_share: float = 0.0,
    advance: Callable[[int], None] = lambda count: None,
) -> dict[str, int]:
    """Writes a data set, which appears under its name when it is complete.

    Args:
      target: name and directory of the data set.
      files: files with the documents. Both files and the documents of a file keep their order.
      validation_files: files with the documents of the split "validation".
      validation_share: alternatively, the share of all documents that go to "validation" instead of "train", spread evenly.
      advance: called after every document with the number of documents written.

    Returns:
      The number of documents in each split.

    Raises:
      UserError: the data set exists already, a file can't be read, a split would be empty, or the disk is full.
    """
    from optima_tpu.runtime.files import making, writing  # imports JAX, and arguments are refused without it

    Bound(0, below=1).refuse("a validation share", validation_share)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", target.name):
        raise UserError(f"expected a name of lower-case letters, digits and _, with a letter first, got {target.name!r}")
    final = target.directory / target.name / VERSION
    if final.parent.exists() and any(final.parent.iterdir()):
        raise UserError(
            f"there is a data set {target.name} in {target.directory} already: delete {final.parent} or choose another name"
        )
    for file in (*files, *validation_files):
        file.check()
    splits = {"train": 0} | ({"validation": 0} if validation_files or validation_share else {})
    with writing(final, "nothing was left there; make room or choose another directory"), making(final.parent) as data_set:
        (partial := data_set / VERSION).mkdir()
        with _writers(partial, target.name, splits) as write:
            for number, (split, text) in enumerate(_documents(files, validation_files, validation_share), start=1):
                write(split, text)
                splits[split] += 1
                signals.check()
                advance(number)
        if empty := [split for split, count in splits.items() if not count]:
            raise UserError(f"no document is in the split {' or '.join(empty)}: give more text or another share")
        _describe(partial, target.name, splits)
    return splits


def _documents(files: Sequence[File], validation_files: Sequence[File], share: float) -> Iterator[tuple[str, str]]:
    """(split, text) of every document."""
    texts = (text for file in files for text in file.documents("calibration"))
    for number, text in enumerate(texts):
        # After every document, the count of each split is within one document of its share.
        yield "validation" if math.floor((number + 1) * share) > math.floor(number * share) else "train", text
    yield from (("validation", text) for file in validation_files for text in file.documents("evaluation"))


@contextlib.contextmanager
def _writers(folder: Path, name: str, splits: Iterable[str]) -> Iterator[Callable[[str, str], None]]:
    from array_record.python.array_record_module import ArrayRecordWriter

    features = _features()
    # One document in each group, as TFDS writes them: any document can then be read alone.
    writers = {
        split: ArrayRecordWriter(str(folder / f"{name}-{split}.array_record-00000-of-00001"), "group_size:1") for split in splits
    }
    try:
        yield lambda split, text: writers[split].write(features.serialize_example({"text": text}))
    finally:
        for writer in writers.values():
            writer.close()


def _describe(folder: Path, name: str, splits: dict[str, int]) -> None:
    import tensorflow_datasets as tfds

    def about(split: str) -> tfds.core.SplitInfo:
        template = tfds.core.ShardedFileTemplate(data_dir=folder, dataset_name=name, split=split, filetype_suffix="array_record")
        size = template.sharded_filepath(shard_index=0, num_shards=1).stat().length
        return tfds.core.SplitInfo(name=split, shard_lengths=[splits[split]], num_bytes=size, filename_template=template)

    tfds.folder_dataset.write_metadata(
        data_dir=folder,
        features=_features(),
        split_infos=[about(split) for split in splits],
        version=VERSION,
        check_data=False,  # it would ask for TensorFlow
        description="Documents of text files in their order.",
        disable_shuffling=True,
    )


def _features():
    import tensorflow_datasets as tfds

    return tfds.features.FeaturesDict({"text": tfds.features.Text()})


def make_parser() -> Parser:
    """The parser of the command line."""
    parser = Parser(
        prog=program("data"),
        description="Makes a data set from text files, for --calibration.source tfds:NAME@DIR. No TensorFlow is needed.",
    )
    parser.add_argument("target", metavar="NAME@DIR", help="name of the data set, and the directory that holds data sets")
    parser.add_argument(
        "files", metavar="FILE", nargs="+", help=".txt (one document), .jsonl, .parquet (each record is one); also .gz"
    )
    parser.add_argument("--field", default="text", help="the field or column with the text (default: %(default)s)")
    validation = parser.add_mutually_exclusive_group()
    validation.add_argument(
        "--validation-share",
        metavar="SHARE",
        type=float,
        default=0.0,
        help="share of the documents, such as 0.05, that go into the split for evaluation (default: none)",
    )
    validation.add_argument(
        "--validation-files", metavar="FILE", nargs="+", default=[], help="files for that split, instead of a share"
    )
    return parser


def read(arguments: Sequence[str]) -> argparse.Namespace:
    """The arguments. Raises UserError if one of them is wrong."""
    return make_parser().parse_args(arguments)


def run(chosen: argparse.Namespace) -> None:
    """Makes the data set, and prints how to name it."""
    console = Console()
    progress = Progress(
        TextColumn("{task.completed:,} documents written"),
        TimeElapsedColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
    target = TFDS.parse(chosen.target)
    files, others = (
        [File(Path(path).expanduser(), chosen.field) for path in paths] for paths in (chosen.files, chosen.validation_files)
    )
    with progress:
        task = progress.add_task("", total=None)
        counts = build(target, files, others, chosen.validation_share, lambda count: progress.update(task, completed=count))
    signals.ended(0)
    sizes = ", ".join(f"{plural(count, 'document')} in {split}" for split, count in counts.items())
    print(f"wrote {target.directory / target.name / VERSION}: {sizes}; use it with --calibration.source {target}")


main = functools.partial(command.main, "data")

if __name__ == "__main__":
    sys.exit(main())
