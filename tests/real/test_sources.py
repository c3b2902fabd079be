"""Notes of a chat model's memory: found without generating, replaced, read back, and written once."""

from __future__ import annotations

import copy
from datetime import timedelta

import mplus
from tests.helpers.clock import Hands

NOTES = {
    "maria": "I met Maria Keller again today. Maria has moved and now lives in Lisbon, close to the station.",
    "bike": "The bicycle is in the cellar, and its key hangs behind the kitchen door.",
    "dentist": "The dentist asked me to come on the fourth of March, at nine in the morning.",
    "soup": "For the soup: two onions, a carrot, a litre of water, and salt. Cook it for half an hour.",
}


def test_notes_have_a_life(decoder, tokenizer, tmp_path):
    model = mplus.wrap(copy.deepcopy(decoder), mplus.MPlusConfig(mechanism="kv"))
    clock = Hands()
    with mplus.Memory.open(tmp_path, model, tokenizer=tokenizer, clock=clock) as memory:
        for name, note in NOTES.items():
            expires = timedelta(days=90) if name == "dentist" else None
            memory.write(note, source=name, write_id=name, expires=expires)
        for name, asked in {
            "maria": "In which city does Maria Keller live?",
            "bike": "Where do I find the key of my bicycle?",
            "dentist": "When do I have to see the dentist?",
        }.items():
            best, *_ = memory.search(asked)
            assert (best.source, best.text) == (name, NOTES[name])
            assert best.written == clock.now
        assert memory.text("soup") == NOTES["soup"]
        memory.replace("maria", "Maria Keller has moved again, and now lives in Porto.")
    clock.move(days=90)
    with mplus.Memory.open(tmp_path, model, tokenizer=tokenizer, clock=clock) as memory:
        assert [source.name for source in memory.sources()] == ["bike", "soup", "maria"]
        version = memory.version
        memory.write(NOTES["bike"], source="bike", write_id="bike")
        assert memory.version == version
        best, *_ = memory.search("In which city does Maria Keller live?")
        assert "Porto" in best.text
