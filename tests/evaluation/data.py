"""Small files in the formats of the public data sets, with invented content, and a tokenizer of whole words."""

from __future__ import annotations

import gzip
import json
import random
import re

COLOURS = ("red", "green", "blue", "black", "white", "grey", "pink", "brown")


class WordTokenizer:
    """A token is a word with what is between it and the next."""

    bos_token_id = None
    eos_token_id = None

    def __init__(self):
        self.words = {}

    def __call__(self, text, add_special_tokens=True, verbose=True):
        found = re.findall(r"\S+|\n", text)
        return {"input_ids": [self.words.setdefault(word, len(self.words)) for word in found]}

    def decode(self, ids):
        names = list(self.words)
        return " ".join(names[number] for number in ids)


def squad(path, articles=9, paragraphs=3, words=12):
    """Articles "Town 0" and so on; each paragraph says the colour of a house, and is asked for it."""
    rng = random.Random(0)
    data = []
    for article in range(articles):
        town = f"Town_{article}"
        entries = []
        for paragraph in range(paragraphs):
            house, colour = f"house{article}x{paragraph}", COLOURS[(article + paragraph) % len(COLOURS)]
            filler = " ".join(rng.choice(("there", "was", "rain", "again", "today")) for _ in range(words))
            context = f"The {house} is {colour} and {filler}."
            answers = [
                {"text": colour, "answer_start": context.index(colour)},
                {"text": f"{colour} and", "answer_start": 0},
            ]
            qas = [
                {"id": f"{article}-{paragraph}-0", "question": f" What colour is {house}? ", "answers": answers},
                {"id": f"{article}-{paragraph}-1", "question": f"Who owns {house}?", "answers": []},
            ]
            entries.append({"context": context, "qas": qas})
        data.append({"title": town, "paragraphs": entries})
    path.write_text(json.dumps({"version": "1.1", "data": data}), encoding="utf-8")
    return path


def natural_questions(path, questions=6):
    """Gzipped lines; the last question has an answer that its passage does not hold."""
    lines = []
    for number in range(questions):
        text = f"River {number} is {number + 100} miles long and flows to the sea."
        answer = "unknown" if number == questions - 1 else f"{number + 100} miles"
        lines.append(
            {
                "question": f"how long is river {number}",
                "answers": [answer, f"{number + 100}"],
                "ctxs": [{"title": f"River {number}", "text": text, "hasanswer": True, "isgold": True}],
                "nq_annotated_gold": {"title": f"River {number}", "long_answer": f"Long: {text}", "short_answers": []},
            }
        )
    with gzip.open(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(line) + "\n" for line in lines)
    return path


def key_value(path, records=4, pairs=10):
    """Gzipped lines of pairs like k3x7 -> v3x7."""
    with gzip.open(path, "wt", encoding="utf-8") as file:
        for record in range(records):
            entries = [[f"k{record}x{pair}", f"v{record}x{pair}"] for pair in range(pairs)]
            line = {"ordered_kv_records": entries, "key": entries[0][0], "value": entries[0][1]}
            file.write(json.dumps(line) + "\n")
    return path


def babi(path, stories=3):
    """Stories of four sentences with two questions each, in the format of the tasks."""
    lines = []
    for story in range(stories):
        place, other = ("garden", "kitchen", "office")[story % 3], ("hallway", "bedroom")[story % 2]
        lines += [
            f"1 Mary went to the {place}.",
            f"2 John moved to the {other}.",
            f"3 Where is Mary? \t{place}\t1",
            "4 Mary got the milk there.",
            f"5 John went to the {place}.",
            f"6 Where is the milk? \t{place}\t4 1",
        ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def novels(folder):
    """Two novels and an index: one trains, one tests."""
    folder.mkdir()
    for name, word in (("train_book", "alpha"), ("test_book", "omega")):
        paragraphs = [" ".join(f"The {word} {part} of day {day} passed." for part in range(4)) for day in range(30)]
        with gzip.open(folder / f"{name}.txt.gz", "wt", encoding="utf-8") as file:
            file.write("\n\n".join(paragraphs))
    (folder / "INDEX.tsv").write_text("file\tsplit\ntrain_book.txt.gz\ttrain\ntest_book.txt.gz\ttest\n")
    return folder
