"""Chat with a decoder that remembers: what no longer fits the prompt goes into a memory in a folder, and stays there.

Type something, end with Ctrl-D, and start it again: it goes on knowing. The decoder that comes with mplus only tells
stories; `mplus get smollm2` brings one that answers, and prints the folder to put in its place.
"""

import sys
from importlib.resources import files

from transformers import AutoModelForCausalLM, AutoTokenizer

import mplus

name = str(files("mplus") / "data" / "stories260K")  # or the folder or name of a chat model
tokenizer = AutoTokenizer.from_pretrained(name)
model = AutoModelForCausalLM.from_pretrained(name)
mplus.wrap(model, mplus.MPlusConfig(mechanism="kv"))
plain = tokenizer.chat_template is None  # then prompts are lines of "User: ..." and "Assistant: ..."

with mplus.Memory.open("assistant", model, tokenizer=tokenizer) as memory:
    print("I know of", [source.name for source in memory.sources()])
    with mplus.Chat(model, memory, remember=["user"], plain=plain, max_new_tokens=20, do_sample=False) as chat:
        for line in filter(None, map(str.strip, sys.stdin)):
            answer = chat.stream(line)
            for piece in answer:
                print(piece, end="", flush=True)
            print()
            for piece in answer.reply.recalled:
                print(f"  (from {piece.source})")
