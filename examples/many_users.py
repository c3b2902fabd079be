"""One decoder, many users: each has a memory of their own, and all share what was read once for everybody."""

from importlib.resources import files

from transformers import AutoTokenizer

import mplus

name = files("mplus") / "data" / "recall-tiny"  # or a decoder with a memory that you trained: see train_lora.py
model = mplus.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)


def answer(memory, question):
    """Return the next word: the decoder that comes with mplus answers in one."""
    prompt = tokenizer(question, return_tensors="pt")
    text = model.generate(**prompt, memory=memory, max_new_tokens=1, do_sample=False)
    return tokenizer.decode(text[0, prompt["input_ids"].shape[1] :])


handbook = model.new_memory(tokenizer=tokenizer)
handbook.write("as you know town of ada baker oslo . it was so and is", source="handbook")

# A fork has the same content and shares the room it takes; what is written to it later is its own.
memories = {user: handbook.fork() for user in ("anna", "omar", "yuki")}

# Texts of several users are written in one pass of the decoder.
said = {"anna": "pet of ada baker owl .", "omar": "pet of ada baker fox .", "yuki": "pet of ada adler cat ."}
texts = [f"by the way {said[user]} so it is and so it was" for user in memories]
mplus.write_together(list(memories.values()), texts, sources=list(memories))

for user, memory in memories.items():
    town, pet = answer(memory, "town of ada baker"), answer(memory, "pet of ada baker")
    print(f"{user}: the town is {town}, the pet is {pet}; knows of {[source.name for source in memory.sources()]}")

memories["anna"].save("anna.memory")  # a user who left: one folder, loaded again when she comes back
anna = mplus.Memory.load("anna.memory", model, tokenizer=tokenizer)
print("anna, back again: the pet is", answer(anna, "pet of ada baker"))
