"""Many users at once over HTTP: tokens per second, time to the first token, gaps, and whether texts are those of alone.

    python -m benchmarks.serving.load                                # writes records/load.json
    python -m benchmarks.serving.load --model smollm2 --mechanism kv --users 1 8 --tokens 32

Users ask in a closed loop, each a memory of their own with a story in it, greedily. Arms take turns in every round:

- ``users N``: so many at once;
- ``one at a time``: the most users, of a server with ``--max-batch 1``;
- ``generate``: one ``model.generate`` after another in a process, without a server (``--root`` for another checkout);
- ``novel``: eight users while another one writes a whole novel.

Server and clients share the machine. Without ``--rounds`` there are three.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.records import ROOT, record_path, write
from benchmarks.serving.server import SIZES, STORIES, Answer, Client, Server, folder, quantiles, stories
from mplus.environment import load_average, run_info
from mplus.hf.pretrained.shipped import chapters

STORY = "Once upon a time there was a little girl named Lily. She loved to play outside in the park with her red ball. "
BEGINNINGS = ("In the garden there was", "Tom and Sue were", "One day, a big red", "The dog said", "Mom was happy when")


def prompt(user: int) -> str:
    """Return what a user asks."""
    return BEGINNINGS[user % len(BEGINNINGS)]


def story(user: int) -> str:
    """Return what the memory of a user was told."""
    return STORY * (8 + user % 8) + f"Her number was {user}."


async def prepare(client: Client, users: int) -> None:
    """Make the memories, and write to each its story."""
    for user in range(users):
        await client.make(f"user{user}")
    await asyncio.gather(*(client.write(f"user{user}", story(user), "story", f"story-{user}") for user in range(users)))


async def ask(client: Client, users: int, turns: int, tokens: int) -> tuple[float, list[list[Answer]]]:
    """Let users ask so many times each, and return the seconds and all answers."""

    async def one(user: int) -> list[Answer]:
        return [await client.answer(f"user{user}", prompt(user), tokens) for _ in range(turns)]

    begun = time.perf_counter()
    answers = await asyncio.gather(*(one(user) for user in range(users)))
    return time.perf_counter() - begun, list(answers)


def arm(seconds: float, answers: Sequence[Sequence[Answer]]) -> dict[str, Any]:
    """Return what one arm gave in one round."""
    flat = [answer for own in answers for answer in own]
    return {
        "tokens_per_second": round(sum(answer.tokens for answer in flat) / seconds, 1),
        "first_token": quantiles([answer.first for answer in flat]),
        "gap": quantiles([gap for answer in flat for gap in answer.gaps]),
    }


async def measured(server: Server, counts: Sequence[int], turns: int, tokens: int) -> dict[str, Any]:
    """Measure a server with each number of users."""
    found: dict[str, Any] = {}
    async with server.client() as client:
        await prepare(client, max(counts))
        alone = [(await client.answer(f"user{user}", prompt(user), tokens)).text for user in range(max(counts))]
        for users in counts:
            before = await client.metrics()
            seconds, answers = await ask(client, users, turns, tokens)
            after = await client.metrics()
            equal = sum(answer.text == alone[user] for user, own in enumerate(answers) for answer in own)
            busy = sum(after.get(f"mplus_{name}_seconds_sum", 0) - before.get(f"mplus_{name}_seconds_sum", 0)
                       for name in ("step", "prefill"))  # fmt: skip
            found[f"users {users}"] = {
                **arm(seconds, answers),
                "texts": users * turns,
                "texts_equal_to_alone": equal,
                "share_neither_step_nor_prefill": round(1 - busy / seconds, 3),
            }
    return found


async def beside_novel(server: Server, users: int, turns: int, tokens: int) -> dict[str, Any]:
    """Measure users while another one writes a novel."""
    novel = "\n\n".join(chapter.text for chapter in chapters())
    async with server.client() as client, server.client("writer") as writer:
        await prepare(client, users)
        await writer.make("novel")
        begun = time.perf_counter()
        writing = asyncio.ensure_future(writer.write("novel", novel, "The Secret Garden"))
        parts: list[tuple[float, list[list[Answer]]]] = []
        while not writing.done() and len(parts) < turns:
            parts.append(await ask(client, users, 1, tokens))
        still = not writing.done()
        before = await writer.sources("novel") if not still else []
        writing.cancel()
    answers = [own for _, some in parts for own in some]
    return {
        **arm(sum(seconds for seconds, _ in parts), answers),
        "novel_characters": len(novel),
        "novel_still_being_written": still,
        "novel_sources": len(before),
        "seconds": round(time.perf_counter() - begun, 1),
    }


GENERATE = """
import json, sys, time, torch
torch.set_num_threads(1)
import mplus
try:
    from mplus.hf.pretrained.shipped import load_decoder, load_tokenizer
except ModuleNotFoundError:  # of an older checkout, which cannot read a folder of this one either
    from mplus.hf.shipped import load_decoder, load_tokenizer
sizes, tokens, stories, prompts = json.load(sys.stdin)
torch.manual_seed(0)
model, tokenizer = mplus.wrap(load_decoder(), mplus.MPlusConfig(**sizes)).eval(), load_tokenizer()
memories = [model.new_memory(tokenizer=tokenizer) for _ in stories]
for story, memory in zip(stories, memories):
    memory.write(story, source="story")
asked = [tokenizer(prompt, return_tensors="pt")["input_ids"] for prompt in prompts]
with torch.no_grad():
    for user in (0, *range(len(asked))):
        if user == 0:
            begun = time.perf_counter()
        model.generate(asked[user], memory=memories[user], max_new_tokens=tokens, do_sample=False,
                       eos_token_id=None, pad_token_id=0)
print(json.dumps(len(asked) * tokens / (time.perf_counter() - begun)))
"""


def one_after_another(root: Path, users: int, tokens: int) -> float:
    """Return the tokens per second of ``generate`` of stories260K, one user after another, by mplus of ``root``."""
    asked = [SIZES, tokens, [story(user) for user in range(users)], [prompt(user) for user in range(users)]]
    done = subprocess.run(
        [sys.executable, "-c", GENERATE],
        input=json.dumps(asked), cwd=root, env={**os.environ, "PYTHONPATH": str(root)}, stdout=subprocess.PIPE,
        text=True, check=True,
    )  # fmt: skip
    return round(float(json.loads(done.stdout.splitlines()[-1])), 1)


async def run(options: argparse.Namespace) -> dict[str, Any]:
    """Run all rounds and return the record."""
    rounds: list[dict[str, Any]] = []
    with folder() as where:
        model = stories(where) if options.model == STORIES else options.model
        more = [] if options.mechanism is None else ["--mechanism", options.mechanism]
        for number in range(options.rounds):
            found: dict[str, Any] = {"load_average": load_average()}
            for name, extra in (("", []), ("one at a time: ", ["--max-batch", "1"])):
                server = Server(model, where / f"memories{number}{len(extra)}", [*more, *extra])
                await server.start()
                try:
                    counts = options.users if not extra else [max(options.users)]
                    turns = options.turns if not extra else 1
                    arms = await measured(server, counts, turns, options.tokens)
                    found |= {f"{name}{key}": value for key, value in arms.items()}
                    if not extra and options.novel:
                        found["novel"] = await beside_novel(server, 8, options.turns * 4, options.tokens)
                finally:
                    server.stop()
            if options.model == STORIES:
                found["generate"] = one_after_another(options.root, max(options.users), options.tokens)
            print(json.dumps(found, indent=1), flush=True)
            rounds.append(found)
    most = max(options.users)
    together = [one[f"users {most}"]["tokens_per_second"] for one in rounds]
    record: dict[str, Any] = {
        **run_info(),
        "settings": {"model": options.model, "mechanism": options.mechanism, "memory": SIZES, "users": options.users,
                     "turns": options.turns, "tokens": options.tokens,
                     "generate_at": "this tree" if options.root == ROOT else options.root.name},
        "rounds": rounds,
        "over_max_batch_1": _ratio(together, [o[f"one at a time: users {most}"]["tokens_per_second"] for o in rounds]),
        "over_one_user": _ratio(together, [one[f"users {min(options.users)}"]["tokens_per_second"] for one in rounds]),
    }  # fmt: skip
    if options.model == STORIES:
        record["over_generate"] = _ratio(together, [one["generate"] for one in rounds])
    return record


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return round(median(one / other for one, other in zip(above, below, strict=True)), 2)


def main() -> None:
    """Measure, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=STORIES)
    parser.add_argument("--mechanism")
    parser.add_argument("--users", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--turns", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--root", type=Path, default=ROOT, help="checkout whose model.generate is measured")
    parser.add_argument("--no-novel", dest="novel", action="store_false")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    record = asyncio.run(run(options))
    name = "load" if options.model == STORIES else f"load-{Path(options.model).name}"
    write(options.out or record_path("serving", name), record)


if __name__ == "__main__":
    main()
