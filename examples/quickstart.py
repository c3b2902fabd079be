"""A decoder reads a text into its memory and generates with it: on a CPU, with the decoder that comes with mplus."""

from importlib.resources import files

from transformers import AutoModelForCausalLM, AutoTokenizer

import mplus

name = str(files("mplus") / "data" / "stories260K")  # or any decoder on the Hugging Face Hub
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)

mplus.wrap(model, mplus.MPlusConfig(chunk_tokens=128, memory_tokens_per_chunk=16, short_term_tokens=64))
memory = model.new_memory(tokenizer=tokenizer)
memory.write("Once upon a time a girl named Lily found a red stone in the garden. " * 40, source="Lily")
prompt = tokenizer("One day, Lily", return_tensors="pt")
story = model.generate(**prompt, memory=memory, max_new_tokens=40, do_sample=False)
print(tokenizer.decode(story[0], skip_special_tokens=True))
memory.save("lily.memory")  # and later: mplus.Memory.load("lily.memory", model, tokenizer=tokenizer)
