"""Chat with a memory: what you tell is kept in a folder, and still known when you start the program again.

The decoder that comes with mplus speaks a little language only. Tell it `pet of ada baker owl .`, ask it
`pet of ada baker`, and end with Ctrl-D.
"""

import sys
from importlib.resources import files

from transformers import AutoTokenizer

import mplus

name = files("mplus") / "data" / "recall-tiny"  # or a decoder with a memory that you trained: see train_lora.py
model = mplus.from_pretrained(name)
tokenizer = AutoTokenizer.from_pretrained(name)


def answer(memory, question):
    """Return the next word. A decoder for prose goes on for longer: raise max_new_tokens."""
    prompt = tokenizer(question, return_tensors="pt")
    text = model.generate(**prompt, memory=memory, max_new_tokens=1, do_sample=False)
    return tokenizer.decode(text[0, prompt["input_ids"].shape[1] :])


with mplus.Memory.open("chat.memory", model, tokenizer=tokenizer) as memory:
    print("Relations are colour, town, pet and fruit. I was told:", [source.name for source in memory.sources()])
    for line in map(str.strip, sys.stdin):
        if line.endswith("."):  # something to keep; a decoder for prose would write every line, and every answer
            memory.write(f"by the way {line} so it is and so it was", source=line)
            print("I will remember.")
        elif line:
            print(answer(memory, line))
