"""A memory that lives in a folder: what is written is on disk at once, and what is forgotten is gone from it."""

from importlib.resources import files
from pathlib import Path

from transformers import AutoModelForCausalLM, AutoTokenizer

import mplus

name = str(files("mplus") / "data" / "stories260K")  # or any decoder on the Hugging Face Hub
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
mplus.wrap(model, mplus.MPlusConfig(chunk_tokens=128, memory_tokens_per_chunk=16, short_term_tokens=64))

with mplus.Memory.open("notes", model, tokenizer=tokenizer, bytes_budget="64MiB") as memory:
    memory.write("Lily found a red stone in the garden and gave it to her mom. " * 60, source="Lily")
    memory.write("Tom lost his ball near the big tree and he was very sad. " * 60, source="Tom")
    # Each chunk is on disk when it has been written: killed here, the program loses nothing.

# Later, in another program: long-term memory is mapped from its files, not read, so this takes no time.
with mplus.Memory.open("notes", model, tokenizer=tokenizer) as memory:
    for source in memory.sources():
        print(f"{source.name}: {source.tokens} tokens, {source.held['long-term']:.0f} long-term rows in each layer")
    prompt = tokenizer("One day, Lily", return_tensors="pt")
    story = model.generate(**prompt, memory=memory, max_new_tokens=20, do_sample=False)
    print(tokenizer.decode(story[0], skip_special_tokens=True))

    memory.forget("Tom")  # when this returns, no file in the folder holds anything that was written from it
    print("left:", [source.name for source in memory.sources()])

print("files:", sum(path.stat().st_size for path in Path("notes").iterdir()) // 1024, "KiB")
