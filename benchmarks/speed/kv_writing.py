"""What writing a memory of keys and values costs, and how much room it takes, beside the decoder's own cache.

    mplus get smollm2                                      # once
    python -m benchmarks.speed.kv_writing NOVEL            # writes records/kv_writing.json

A chat model that people have writes notes, and passages of a novel, to a memory in a directory: every chunk is on disk
when it counts. In between the bare decoder reads the same chunks, so that both are disturbed alike; on a busy machine
the time of the CPU tells more than that of the clock on the wall, which has the waiting for the disk in it. Bytes are
those of the memory as it lies in RAM, reserved room included, with rows in bfloat16 and in int8, and of the files of a
save.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import mplus
from benchmarks.records import record_path, write
from mplus.environment import load_average, run_info
from mplus.evaluation.tasks.notes import Notes
from mplus.evaluation.texts import Texts, read
from mplus.hf.pretrained.smollm2 import smollm2_folder
from mplus.memory import Memory

RECORD = record_path("speed", "kv_writing")


@torch.no_grad()
def speed(model: Any, decoder: Any, memory: Memory, texts: Sequence[str]) -> dict[str, Any]:
    """Write every text, and have the bare decoder read its chunks before or behind that; compare the two."""
    written: list[tuple[float, float]] = []
    bare: list[tuple[float, float]] = []
    tokens: list[int] = []
    memory.write("Warm.", source="warm")
    for number, text in enumerate(texts):
        state: Any = memory.states[0]
        known = len(state.chunk_length)

        def by_memory(text: str = text, number: int = number) -> tuple[float, float]:
            begun = time.perf_counter(), time.process_time()
            memory.write(text, source=f"text {number}")
            return time.perf_counter() - begun[0], time.process_time() - begun[1]

        chunks = model.mplus_engine.mechanism.chunks(ids_of(memory, text), memory.tokenizer)

        def by_decoder(chunks: Sequence[torch.Tensor] = chunks) -> tuple[float, float]:
            begun = time.perf_counter(), time.process_time()
            for ids in chunks:
                decoder(input_ids=ids[None], use_cache=False)
            return time.perf_counter() - begun[0], time.process_time() - begun[1]

        if number % 2:
            written.append(by_memory())
            bare.append(by_decoder())
        else:
            bare.append(by_decoder())
            written.append(by_memory())
        state = memory.states[0]
        if len(state.chunk_length) - known != len(chunks):
            raise SystemExit("the bare decoder must read the chunks that are written")
        tokens.append(sum(map(len, chunks)))
    found: dict[str, Any] = {"texts": len(texts), "tokens": sum(tokens)}
    for place, clock in enumerate(("wall", "cpu")):
        own, plain = [one[place] for one in written], [one[place] for one in bare]
        ratios = sorted(one / other for one, other in zip(plain, own, strict=True))
        found[clock] = {
            "written_tokens_per_second": round(sum(tokens) / sum(own), 1),
            "bare_tokens_per_second": round(sum(tokens) / sum(plain), 1),
            "ratio_of_sums": round(sum(plain) / sum(own), 3),
            "ratio_median": round(statistics.median(ratios), 3),
            "ratio_quartiles": [round(ratios[len(ratios) // 4], 3), round(ratios[3 * len(ratios) // 4], 3)],
        }
    return found


def ids_of(memory: Memory, text: str) -> torch.Tensor:
    """Return the ids ``[n]`` of a text."""
    tokenizer: Any = memory.tokenizer
    return torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


def room(model: Any, memory: Memory, folder: Path) -> dict[str, Any]:
    """Return bytes per token of a memory with rows in bfloat16 and in int8, over the decoder's cache in bfloat16."""
    state: Any = memory.states[0]
    shape = model.mplus_engine.shape
    cache = shape.depth * shape.key_heads * (shape.head_size + shape.value_size) * torch.bfloat16.itemsize
    found: dict[str, Any] = {"tokens": state.tokens, "cache_bytes_per_token_bfloat16": cache}
    half = memory.to(dtype=torch.bfloat16)
    half.save(folder / "saved")
    model.to(torch.bfloat16)
    int8 = mplus.Memory.load(folder / "saved", model, store={"name": "quantized", "format": "int8"})
    model.to(torch.float32)
    for name, one in (("bfloat16", half), ("int8", int8)):
        begun: Any = one.states[0]
        begin = begun.begin_rows.nbytes
        found[name] = {
            "in_ram": round(one.nbytes / state.tokens / cache, 3),
            "in_ram_without_begin": round((one.nbytes - begin) / state.tokens / cache, 3),
        }
    files = sum(path.stat().st_size for path in (folder / "saved").iterdir())
    found["bfloat16"]["saved"] = round(files / state.tokens / cache, 3)
    return found


def main(arguments: list[str]) -> None:
    """Write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("novel", type=Path)
    parser.add_argument("--notes", type=int, default=48)
    parser.add_argument("--passages", type=int, default=16)
    options = parser.parse_args(arguments)
    tokenizer: Any = AutoTokenizer.from_pretrained(smollm2_folder(), local_files_only=True)
    decoder = AutoModelForCausalLM.from_pretrained(smollm2_folder(), local_files_only=True).eval()
    bare = AutoModelForCausalLM.from_pretrained(smollm2_folder(), local_files_only=True).eval()
    model = mplus.wrap(decoder, {"mechanism": "kv"})
    counted, text = Texts(tokenizer), read(options.novel)
    task = Notes(Notes.Options(notes=options.notes, split="choose"), counted)
    passages = list(counted.join([f"{part}\n\n" for part in text.split("\n\n")], 120))[40 : 40 + options.passages]
    told = {"notes": [one.text for one in task.episodes()[0].passages], "novel": passages}
    found: dict[str, Any] = {}
    for name, texts in told.items():
        with (
            tempfile.TemporaryDirectory() as place,
            mplus.Memory.open(Path(place) / "memory", model, tokenizer=tokenizer) as memory,
        ):
            found[name] = speed(model, bare, memory, texts)
            found[name]["room"] = room(model, memory, Path(place))
        sys.stdout.write(f"{name}: {found[name]}\n")
    circumstances = run_info(load_average=load_average())
    config = model.mplus_config.to_dict()
    write(RECORD, {"program": "benchmarks.speed.kv_writing", **circumstances, "config": config, **found})


if __name__ == "__main__":
    main(sys.argv[1:])
