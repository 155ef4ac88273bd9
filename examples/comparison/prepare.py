"""Make the data of the plans: GSM8K, textbooks, commonsense and SST-2, with the same held-out parts for every run.

    git clone https://github.com/openai/grade-school-math
    for book in physics life-liberty-and-pursuit-happiness college-success-bundle; do
        git clone --depth 1 https://github.com/openstax/osbooks-$book
    done
    git clone --depth 1 https://github.com/AGI-Edgerunners/LLM-Adapters
    python examples/comparison/prepare.py --output data \
        --gsm8k grade-school-math/grade_school_math/data/train.jsonl --textbooks osbooks-* \
        --commonsense LLM-Adapters/dataset --sst2 SST-2

GSM8K (MIT licence), OpenStax's textbooks (CC BY 4.0) and LLM-Adapters' commonsense tasks (ODC-By) are public, SST-2 is
GLUE's (https://gluebenchmark.com); what is left out is not made. A textbook may also be a file of JSON lines with the
fields `title` and `text`, plain or compressed; with `--source openstax/` only records whose `source` begins so. The
commonsense mix is trained on questions and answers of BoolQ, ARC and OpenBookQA; held out are these tasks' tests and
PIQA's.
"""

import argparse
import csv
import json
import random
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from lightning_rlora.data.sources import read_records

ASKED = ["boolq", "ARC-Easy", "ARC-Challenge", "openbookqa"]
"""Tasks that are trained on; BoolQ's questions come without their passages."""
CNXML = "{http://cnx.rice.edu/cnxml}"
TEXT = {f"{CNXML}para", f"{CNXML}item"}


def chapters(path: Path, source: str) -> Iterator[dict[str, str]]:
    """The documents of a clone of one of OpenStax's books, or of a file of JSON lines."""
    if path.is_file():
        for record in read_records(str(path), "train"):
            if str(record.get("source", "")).startswith(source):
                yield {"title": record["title"], "text": record["text"]}
        return
    for file in sorted(path.glob("modules/*/index.cnxml")):
        document = ElementTree.parse(file).getroot()
        title, content = document.find(f"{CNXML}title"), document.find(f"{CNXML}content")
        if content is not None:
            text = "\n\n".join(paragraphs(content))
            if len(text) > 500:  # not a bare cover page
                yield {"title": "" if title is None else "".join(title.itertext()), "text": text}


def paragraphs(element: ElementTree.Element) -> Iterator[str]:
    """The running text, paragraph by paragraph, without formulas' markup and what only teachers see."""
    for child in element:
        if child.get("class") == "os-teacher":
            continue
        if child.tag in TEXT:
            text = " ".join("".join(part for part in words(child)).split())
            if text:
                yield text
        else:
            yield from paragraphs(child)


def words(element: ElementTree.Element) -> Iterator[str]:
    yield element.text or ""
    for child in element:
        if child.tag.startswith(CNXML):
            yield from words(child)
        yield child.tail or ""


def split(records: list[dict[str, str]], every: int) -> dict[str, list[dict[str, str]]]:
    """Hold out every so-manieth record."""
    train = [record for number, record in enumerate(records) if number % every]
    return {"train": train, "validation": records[::every]}


def commonsense(folder: Path) -> dict[str, list[dict[str, str]]]:
    """The tasks of LLM-Adapters in one, in random order, so that the first ones are a sample of all."""
    parts = {"train": [], "validation": []}
    for name, part, tasks in (("train", "train", ASKED), ("validation", "test", [*ASKED, "piqa"])):
        for task in tasks:
            (path,) = folder.glob(f"{task}/{part}.json*")
            for record in read_records(str(path), part):
                parts[name].append({"text": f"{record['instruction']}\n\n{record['output']}"})
        random.Random(0).shuffle(parts[name])
    return parts


def sst2(folder: Path) -> dict[str, list[dict[str, str]]]:
    """GLUE's phrases with their sentiment in a word; its dev set is held out."""
    parts = {}
    for name, file in (("train", "train.tsv"), ("validation", "dev.tsv")):
        with (folder / file).open(encoding="utf-8", newline="") as lines:
            rows = csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE)
            words = {"0": "negative", "1": "positive"}
            parts[name] = [{"sentence": row["sentence"].strip(), "sentiment": words[row["label"]]} for row in rows]
    return parts


def write(parts: dict[str, list[dict[str, str]]], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        print(f"{folder / name}.jsonl: {len(part)} records, {sum(len(''.join(r.values())) for r in part):,} characters")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gsm8k", type=Path, help="its train.jsonl, plain or compressed")
    parser.add_argument("--textbooks", type=Path, nargs="+", help="clones, or files of JSON lines")
    parser.add_argument("--source", default="", help="of records in files, what `source` begins with")
    parser.add_argument("--commonsense", type=Path, help="folder `dataset` of a clone, its files plain or compressed")
    parser.add_argument("--sst2", type=Path, help="folder with GLUE's train.tsv and dev.tsv")
    parser.add_argument("--output", type=Path, required=True)
    arguments = parser.parse_args()
    if arguments.gsm8k:
        records = read_records(str(arguments.gsm8k), "train")
        problems = [{key: record[key] for key in ("question", "answer")} for record in records]
        write(split(problems, 20), arguments.output / "gsm8k")
    if arguments.textbooks:
        documents = [document for path in arguments.textbooks for document in chapters(path, arguments.source)]
        write(split(documents, 20), arguments.output / "textbooks")
    if arguments.commonsense:
        write(commonsense(arguments.commonsense), arguments.output / "commonsense")
    if arguments.sst2:
        write(sst2(arguments.sst2), arguments.output / "sst2")


if __name__ == "__main__":
    main()
