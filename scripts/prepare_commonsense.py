"""Check the commonsense reasoning data of the LLM-Adapters project and lay them out for training and evaluation.

    python scripts/prepare_commonsense.py LLM-Adapters            # a checkout of the project, with its data sets
    python scripts/prepare_commonsense.py commonsense_170k.json   # the training data alone
    python scripts/prepare_commonsense.py LLM-Adapters --max_per_task 200 --output_dir data/commonsense_small

Runs on the CPU, in seconds; nothing is downloaded. A folder has `commonsense_170k.json` in it or in one of its folders,
and for each task a file `<task>/test.json`. Expected result: `data/commonsense/train.json` and
`data/commonsense/test/<task>.json`, with every record checked and the records of each task counted. Nothing is written
if a record is wrong; `--drop_wrong` leaves such records out instead.
"""

import argparse
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from common.arguments import positive
from common.files import write_json
from prepare.commonsense import TASKS, Record, read_records, tasks_of_answer

TRAIN_FILE = "commonsense_170k.json"


def find_file(folder: Path, name: str) -> Path:
    """The one file in `folder`, at any depth, whose path ends with `name`.

    Raises:
        ValueError: there is none, or several.
    """
    found = sorted(folder.rglob(name))
    if len(found) != 1:
        listed = f"{len(found)}: {', '.join(map(str, found))}" if found else "none"
        raise ValueError(
            f"{folder}: expected one {name} in it or in one of its folders, found {listed}. Give the folder that has "
            "it, --tasks for fewer tasks, or the training file alone."
        )
    return found[0]


def find_files(source: Path, tasks: Sequence[str]) -> tuple[Path, dict[str, Path]]:
    """The training file and the test file of each task; no test files if `source` is a file itself.

    Raises:
        ValueError: `source` does not exist, or a file is missing from it.
    """
    if source.is_file():
        return source, {}
    if not source.is_dir():
        raise ValueError(f"{source}: no such file or folder; give a checkout of LLM-Adapters or its {TRAIN_FILE}.")
    return find_file(source, TRAIN_FILE), {task: find_file(source, f"{task}/test.json") for task in tasks}


def kind_of(record: Record) -> str:
    """The tasks that a training record may belong to; answer1 to answer5 do not say more."""
    return ", ".join(tasks_of_answer(record["answer"]))


def limit_records(
    records: Sequence[Record], kind: Callable[[Record], str], max_per_kind: int | None, seed: int
) -> list[Record]:
    """A random choice of at most `max_per_kind` records of each kind, the same for the same seed, in their order."""
    if max_per_kind is None:
        return list(records)
    places = defaultdict(list)
    for place, record in enumerate(records):
        places[kind(record)].append(place)
    generator = random.Random(seed)
    chosen = [place for group in places.values() for place in generator.sample(group, min(max_per_kind, len(group)))]
    return [records[place] for place in sorted(chosen)]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help=f"folder of the data, or {TRAIN_FILE} alone")
    parser.add_argument("--output_dir", type=Path, default=Path("data/commonsense"))
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="test sets to read")
    parser.add_argument(
        "--max_per_task",
        type=positive,
        help="records of each test set, and training records of each kind of answer, chosen at random",
    )
    parser.add_argument("--drop_wrong", action="store_true", help="leave wrong records out")
    parser.add_argument("--seed", type=int, default=0, help="of --max_per_task")
    args = parser.parse_args(arguments)
    try:
        prepare(args)
    except ValueError as error:
        parser.error(str(error))


def prepare(args: argparse.Namespace) -> None:
    """Write the files; all is read and checked before anything is written."""
    train_file, test_files = find_files(args.source, args.tasks)
    train = limit_records(read_records(train_file, None, args.drop_wrong), kind_of, args.max_per_task, args.seed)
    tests = {
        task: limit_records(
            read_records(path, [task], args.drop_wrong), lambda record: "test", args.max_per_task, args.seed
        )
        for task, path in test_files.items()
    }
    write_json(args.output_dir / "train.json", train)
    print(f"wrote {args.output_dir / 'train.json'} ({len(train)} records)")
    for kind, count in Counter(map(kind_of, train)).items():
        print(f"  {count:7} {kind}")
    questions = {record["instruction"] for record in train}
    for task, records in tests.items():
        path = args.output_dir / "test" / f"{task}.json"
        write_json(path, records)
        seen = sum(record["instruction"] in questions for record in records)
        note = f", {seen} of them also in the training data" if seen else ""
        print(f"wrote {path} ({len(records)} records{note})")


if __name__ == "__main__":
    main()
