"""A SYNTHETIC corpus of revisions: made-up sentences and rule-made edits, for trying irtune without any data.

It says nothing about real revisions. Each pair comes from a sentence about a small world of towns, and one edit:

    fluency          a grammar or spelling mistake is corrected
    clarity          a roundabout phrase becomes a short one
    coherence        a connective that ties the sentence to the one before is added
    style            colloquial wording becomes formal
    meaning-changed  a number, a place or a claim is replaced

    python -m irtune.data.synthetic FOLDER
"""

import json
import random
import sys
from pathlib import Path

PLACES = ("harbour", "old mill", "library", "market hall", "river bridge", "school", "lighthouse", "observatory",
          "orchard", "town archive", "ferry landing", "quarry", "bakery", "signal tower", "glasshouse")  # fmt: skip
PEOPLE = ("the council", "a local engineer", "the gardeners", "two visiting students", "the ferry company",
          "an elderly baker", "the night watch", "a group of volunteers", "the librarian")  # fmt: skip
ACTIONS = ("repaired", "measured", "painted", "photographed", "inspected", "reopened", "insured", "surveyed",
           "described", "restored", "rented", "closed")  # fmt: skip
TIMES = ("in the spring", "after the flood", "last winter", "before the festival", "during the strike",
         "at the end of the year", "on market days", "within a week")  # fmt: skip
REASONS = ("the roof had begun to leak", "visitors kept asking for it", "the insurance required it",
           "nobody else had the keys", "the old records were incomplete", "costs had risen again")  # fmt: skip
ROUNDABOUT = (
    ("because", "due to the fact that"),
    ("now", "at this particular point in time"),
    ("to save money", "for the purpose of achieving a saving of money"),
    ("often", "on a great many separate occasions"),
    ("could", "was in a position in which it was possible to"),
)
MISTAKES = (
    ("had begun", "had began"),
    ("the ", "teh "),
    ("was ", "were "),
    ("it cost", "it costed"),
    (" a ", " an "),
    ("required", "requred"),
    (", and", " ,and"),
)
CONNECTIVES = ("However, ", "As a result, ", "For this reason, ", "In addition, ", "Meanwhile, ", "Nevertheless, ")
COLLOQUIAL = (
    ("was very expensive", "cost a ton of cash"),
    ("did not", "didn't"),
    ("many people", "loads of folks"),
    ("was delighted", "was super happy"),
    ("children", "kids"),
)


def _sentence(rng: random.Random) -> str:
    who, what, where = rng.choice(PEOPLE), rng.choice(ACTIONS), rng.choice(PLACES)
    number = rng.randint(2, 90)
    forms = (
        f"{who} {what} the {where} {rng.choice(TIMES)} because {rng.choice(REASONS)}.",
        f"The {where} was {what} {rng.choice(TIMES)}, and it cost {number} thousand crowns because "
        f"{rng.choice(REASONS)}.",
        f"In {1900 + number} {who} {what} the {where}, and many people came to see it now and then.",
        f"The work at the {where} was very expensive, so {who} did not finish it {rng.choice(TIMES)}.",
        f"A teacher was delighted when {who} {what} the {where}, which {number} children often used.",
    )
    text = rng.choice(forms)
    return text[0].upper() + text[1:]


def _swap(text: str, pairs: tuple[tuple[str, str], ...], rng: random.Random) -> str | None:
    """Replace one phrase that occurs in `text`; None when none does."""
    usable = [(old, new) for old, new in pairs if old in text]
    return text.replace(*rng.choice(usable), 1) if usable else None


def _change_meaning(text: str, rng: random.Random) -> str:
    for words in (PLACES, ACTIONS, TIMES):
        for word in words:
            if word in text and rng.random() < 0.7:
                return text.replace(word, rng.choice([other for other in words if other != word]), 1)
    digits = [token for token in text.replace(",", " ").split() if token.isdigit()]
    return text.replace(digits[0], str(int(digits[0]) + rng.randint(3, 40)), 1) if digits else "Not yet: " + text


def _pair(intention: str, rng: random.Random) -> tuple[str, str] | None:
    text = _sentence(rng)
    if intention == "coherence":
        return text, rng.choice(CONNECTIVES) + text[0].lower() + text[1:]
    if intention == "meaning-changed":
        return text, _change_meaning(text, rng)
    table = {"fluency": MISTAKES, "clarity": ROUNDABOUT, "style": COLLOQUIAL}[intention]
    worse = _swap(text, table, rng)
    return None if worse is None else (worse, text)


INTENTIONS = ("clarity", "coherence", "fluency", "meaning-changed", "style")


def synthetic_pairs(count: int, seed: int = 0) -> list[dict[str, str]]:
    """`count` different rows with the columns id, before, after and label; intentions in turn."""
    rng = random.Random(seed)
    rows: list[dict[str, str]] = []
    seen: set[tuple[str, str]] = set()
    while len(rows) < count:
        intention = INTENTIONS[len(rows) % len(INTENTIONS)]
        pair = _pair(intention, rng)
        if pair is None or pair in seen:
            continue
        seen.add(pair)
        rows.append({"id": f"synthetic-{len(rows)}", "before": pair[0], "after": pair[1], "label": intention})
    return rows


def write_corpus(folder: Path, train: int = 1200, dev: int = 150, test: int = 150, seed: int = 0) -> None:
    """Write train.jsonl, dev.jsonl and test.jsonl to `folder`; no pair is in two of them."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = synthetic_pairs(train + dev + test, seed)
    for name, part in (("train", rows[:train]), ("dev", rows[train : train + dev]), ("test", rows[train + dev :])):
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (folder / f"{name}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    write_corpus(Path(sys.argv[1]))
