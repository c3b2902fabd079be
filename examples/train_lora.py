"""Teach a decoder to use its memory: LoRA adapters, retriever and begin rows are trained, the decoder stays as it is.

A few steps, to show how it goes. A training that is of use has thousands: see docs/training.md.
"""

from importlib.resources import files

import mplus
from mplus.training import train

novel = files("mplus") / "data" / "novels" / "Burnett_Garden_1911.txt.gz"  # or a folder of texts, or a data set
text = {"kind": "documents", "paths": [str(novel)], "chunk_tokens": 64, "target_tokens": 64, "query_tokens": 8}
recipe = {
    "name": "garden",
    "streams": 4,  # memories that are trained at a time
    "model": {"path": "stories260K"},  # or any decoder on the Hugging Face Hub
    "memory": {
        "chunk_tokens": 64,
        "memory_tokens_per_chunk": 8,
        "short_term_tokens": 64,
        "retrieved_tokens": 16,
        "long_term_tokens": 2000,
        "adapters": {"rank": 8},  # LoRA of rank 8 for writing, and another one for reading
    },
    "optimizer": {"parameters": "adapters", "learning_rate": 3e-3, "warmup_steps": 2},
    "data": {"novel": text},
    "stages": [
        {  # writes two chunks and reads the text that follows them, with gradient through both
            "name": "write-and-read",
            "steps": 6,
            "objectives": [{"name": "single_context", "data": "novel", "chunks": 2}],
        },
        {  # writes four chunks and learns to find again those that the text is about
            "name": "long-term",
            "steps": 6,
            "long_term": True,
            "retriever_loss": {"kind": "contrastive", "negatives": "batch"},
            "objectives": [{"name": "multi_chunk", "data": "novel", "chunks": 4}],
        },
    ],
    "metrics": {"every_steps": 2},
}
result = train(recipe, out="garden-run", progress=False)
for record in result.records:
    print(f"{record['stage']}, step {record['step']}: {record['loss']:.2f} nats per token")

model = mplus.from_pretrained("garden-run/model")
memory = model.new_memory(tokenizer=result.tokenizer)
memory.write("Mary found the key of the garden under a stone. " * 20, source="key")
prompt = result.tokenizer("Mary opened the door", return_tensors="pt")
story = model.generate(**prompt, memory=memory, max_new_tokens=20, do_sample=False)
print(result.tokenizer.decode(story[0], skip_special_tokens=True))
