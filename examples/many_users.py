"""One decoder, many users: each has a memory of their own, and all are answered at once, a token of each in a step."""

from importlib.resources import files

from transformers import AutoTokenizer

import mplus

name = files("mplus") / "data" / "recall-tiny"  # or a decoder with a memory that you trained: see train_lora.py
model = mplus.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)
reader = mplus.BatchReader(model)


def ids_of(text):
    """Return the token ids of a text."""
    return tokenizer(text)["input_ids"]


def converse(memories, first, then):
    """Ask two questions of every memory, all of them at once; return who was told what."""
    rows = reader.join([(memory, ids_of(first)) for memory in memories.values()])
    users = dict(zip(rows, memories, strict=True))
    answers = {users[row]: [int(row.logits.argmax())] for row in rows}  # this decoder answers in one word
    for token in (None, *ids_of(then)):  # every row reads its own answer, then all read the next question
        logits = reader.step([answers[users[row]][0] if token is None else token for row in reader.rows])
    for row, token in zip(reader.rows, logits.argmax(-1).tolist(), strict=True):
        answers[users[row]].append(token)
    reader.leave(rows)  # others may join at any time, and rows leave when they have ended
    return {user: tokenizer.decode(told) for user, told in answers.items()}


handbook = model.new_memory(tokenizer=tokenizer)
handbook.write("as you know town of ada baker oslo . it was so and is", source="handbook")

# A fork has the same content and shares the room it takes; what is written to it later is its own.
memories = {user: handbook.fork() for user in ("anna", "omar", "yuki")}

# Texts of several users are written in one pass of the decoder.
said = {"anna": "pet of ada baker owl .", "omar": "pet of ada baker fox .", "yuki": "pet of ada adler cat ."}
texts = [f"by the way {said[user]} so it is and so it was" for user in memories]
mplus.write_together(list(memories.values()), texts, sources=list(memories))

for user, told in converse(memories, "town of ada baker", ". pet of ada baker").items():
    print(f"{user}: {told}; knows of {[source.name for source in memories[user].sources()]}")

memories["anna"].save("anna.memory")  # a user who left: one folder, loaded again when she comes back
anna = mplus.Memory.load("anna.memory", model, tokenizer=tokenizer)
print("anna, back again:", converse({"anna": anna}, "pet of ada baker", ". town of ada baker")["anna"])
