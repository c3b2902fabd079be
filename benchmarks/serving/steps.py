"""The batch reader alone, without a server: a step and the reading of prompts, by the number of rows.

python -m benchmarks.serving.steps                       # stories260K with M+; writes records/steps.json
python -m benchmarks.serving.steps --decoder stories260k-kv  # it with kv; writes records/steps-stories260k-kv.json
python -m benchmarks.serving.steps --decoder smollm2     # SmolLM2 with kv; writes records/steps-smollm2.json

All is timed in turns in one process, wall time and the processor's: a step of B rows beside a plain forward of B rows
over a static cache of as many columns, prompts that are read together beside one that is read by itself, and one
``model.generate`` after another. The texts of all rows are those of ``generate``, which is
that of this tree: an older one cannot run beside it.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, StaticCache

import mplus
from benchmarks.records import record_path, write
from mplus.environment import load_average, run_info
from mplus.hf.batch.requests import Row
from mplus.hf.model.static_reader import running_decoder
from mplus.hf.pretrained.shipped import chapters, load_decoder, load_tokenizer
from mplus.hf.pretrained.smollm2 import smollm2_folder
from mplus.memory import Memory
from mplus.timing import Arm, in_rounds, ratio, summary

SIZES: Mapping[str, tuple[int, ...]] = {"stories260k": (1, 8, 32), "stories260k-kv": (1, 8, 32), "smollm2": (1, 8)}
CHARACTERS = 4000
QUESTIONS = ("In the garden there was", "Mary was", "Once upon a time there was a robin who", "He said that")
NEW = 32
"""Tokens of an answer."""


def main() -> int:
    """Measure, write the record and print it; return 1 where a text differs from that of ``generate``."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--decoder", choices=SIZES, default="stories260k")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--sizes", type=int, nargs="+", help="numbers of rows")
    parser.add_argument("--no-record", action="store_true", help="print only")
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = loaded(given.decoder)
    sizes = given.sizes or SIZES[given.decoder]
    users = Users.of(model, tokenizer, max(sizes))
    measured = [measure(model, users, rows, given.rounds) for rows in sizes]
    record = {
        **run_info(), "load_average": load_average(), "decoder": given.decoder, "rounds": given.rounds,
        "new_tokens": NEW, "equal": users.equal(model), "by_rows": measured,
    }  # fmt: skip
    if not given.no_record:
        name = "steps" if given.decoder == "stories260k" else f"steps-{given.decoder}"
        write(record_path("serving", name), record)
    print(json.dumps(record, indent=1))
    return 0 if record["equal"] else 1


def loaded(name: str) -> tuple[Any, Any]:
    """Return the wrapped decoder of a name, and its tokenizer."""
    torch.manual_seed(0)
    if name == "smollm2":
        folder = smollm2_folder()
        decoder = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        return mplus.wrap(decoder, mplus.MPlusConfig(mechanism="kv")), tokenizer
    if name == "stories260k-kv":
        return mplus.wrap(load_decoder(), mplus.MPlusConfig(mechanism="kv")).eval(), load_tokenizer()
    config = mplus.MPlusConfig(
        chunk_tokens=128, memory_tokens_per_chunk=32, short_term_tokens=192, retrieved_tokens=96,
        long_term_tokens=20000, retriever={"name": "linear", "width": 32},
    )  # fmt: skip
    return mplus.wrap(load_decoder(), config).eval(), load_tokenizer()


class Users:
    """Users with a memory of a piece of the novel each, and a question."""

    def __init__(self, memories: Sequence[Memory], prompts: Sequence[list[int]]) -> None:
        self.memories, self.prompts = memories, prompts

    @classmethod
    def of(cls, model: Any, tokenizer: Any, count: int) -> Users:
        """Make users whose memories hold about as much as one another."""
        novel = "".join(chapter.text for chapter in chapters())
        memories = [model.new_memory(tokenizer=tokenizer, seed=user) for user in range(count)]
        pieces = [novel[user * CHARACTERS : (user + 1) * CHARACTERS] for user in range(count)]
        mplus.write_together(memories, pieces, ["novel"] * count, progress=False)
        prompts = [tokenizer(QUESTIONS[user % len(QUESTIONS)])["input_ids"] for user in range(count)]
        return cls(memories, prompts)

    def requests(self, rows: int) -> list[tuple[Memory, list[int]]]:
        """Return what the first ``rows`` users ask."""
        return list(zip(self.memories[:rows], self.prompts, strict=False))

    def generate(self, model: Any, user: int) -> list[int]:
        """Return the answer to one user by ``model.generate``."""
        ids = torch.tensor([self.prompts[user]])
        output: torch.Tensor = model.generate(
            ids, attention_mask=torch.ones_like(ids), memory=self.memories[user], max_new_tokens=NEW,
            min_new_tokens=NEW, do_sample=False, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
        answer: list[int] = output[0, ids.shape[1] :].tolist()
        return answer

    def equal(self, model: Any) -> bool:
        """Return True if the reader gives all users at once the texts that ``generate`` gives to each."""
        reader = mplus.BatchReader(model)
        rows = reader.join(self.requests(len(self.prompts)), max_new_tokens=NEW)
        said: dict[Row, list[int]] = {row: [int(row.logits.argmax())] for row in rows}
        for _ in range(NEW - 1):
            logits = reader.step([said[row][-1] for row in reader.rows])
            for row, token in zip(reader.rows, logits.argmax(-1).tolist(), strict=True):
                said[row].append(token)
        return all(said[row] == self.generate(model, user) for user, row in enumerate(rows))


def measure(model: Any, users: Users, rows: int, rounds: int) -> dict[str, Any]:
    """Return the times of B rows, and their ratios."""
    stepping, joining = mplus.BatchReader(model), mplus.BatchReader(model)
    stepping.join(users.requests(rows), max_new_tokens=NEW)
    in_front = max(map(model.mplus_engine.mechanism.prefix_rows, (one.snapshot()[0] for one in users.memories[:rows])))
    columns = in_front + max(map(len, users.prompts[:rows]))
    floor = Floor(model, rows, columns, rounds + 2)
    tokens = [1] * rows
    arms = {
        "step": lambda _: stepping.step(tokens),
        "plain forward": lambda _: floor.step(),
        "prefill together": lambda _: joining.join(users.requests(rows), max_new_tokens=NEW),
        "prefill alone": lambda number: joining.join([users.requests(rows)[number % rows]], max_new_tokens=NEW),
        "generate": lambda number: users.generate(model, number % rows),
    }
    cpu: dict[str, list[float]] = {name: [] for name in arms}

    def counted(name: str, run: Callable[[int], Any]) -> Callable[[int], None]:
        def work(number: int) -> None:
            begun = time.process_time()
            run(number)
            cpu[name].append(time.process_time() - begun)

        return work

    def emptied(_: int) -> None:
        joining.leave(joining.rows)

    wall = in_rounds([Arm(name, counted(name, run), emptied) for name, run in arms.items()], rounds, model.device)
    cpu = {name: seconds[-rounds:] for name, seconds in cpu.items()}  # without the rounds that warm up
    ratios = {
        f"{name}, {kind}": value for kind, times in (("cpu", cpu), ("wall", wall)) for name, value in over(times, rows)
    }
    return {
        "rows": rows, "columns": columns, **ratios,
        "cpu": {arm: summary(seconds) for arm, seconds in cpu.items()},
        "wall": {arm: summary(seconds) for arm, seconds in wall.items()},
    }  # fmt: skip


def over(times: Mapping[str, list[float]], rows: int) -> Iterator[tuple[str, float | None]]:
    """Yield the ratios that are asked for, medians over the rounds."""
    read, step = times["prefill together"], times["step"]
    yield "step over plain forward", ratio(times, "step", "plain forward")
    own = {**times, "own": [seconds / rows for seconds in read]}
    yield "prefill per row over alone", ratio(own, "own", "prefill alone")
    own["own"] = [(one + (NEW - 1) * other) / rows for one, other in zip(read, step, strict=True)]
    yield "tokens per second over generate", ratio(own, "generate", "own")


class Floor:
    """A plain decoder with a static cache that has as many columns as the reader's rows."""

    def __init__(self, model: Any, rows: int, columns: int, steps: int) -> None:
        self.decoder = running_decoder(model, model.mplus_engine.adapter("read"))
        self.place, config = columns, self.decoder.config.get_text_config(decoder=True)
        self.cache = StaticCache(config=self.decoder.config, max_cache_len=columns + steps)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        for layer in range(config.num_hidden_layers):
            keys = torch.randn(rows, heads, columns, width)
            self.cache.update(keys, keys, layer)
        self.ids = torch.ones(rows, 1, dtype=torch.int64)

    def step(self) -> None:
        """Read one more token of every row."""
        place = torch.full_like(self.ids, self.place)
        self.decoder(input_ids=self.ids, position_ids=place, past_key_values=self.cache, use_cache=True)
        self.place += 1


if __name__ == "__main__":
    raise SystemExit(main())
