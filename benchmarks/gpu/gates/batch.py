"""Gates of the batch reader: users who join, step and leave read what each reads alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.gates.decoders import MECHANISMS, Decoders, ids, written
from benchmarks.gpu.session import Session
from mplus import BatchReader
from mplus.memory import Memory

USERS, STEPS = 5, 4


def batch_reader(session: Session) -> None:
    """Open the gates, for M+ and ``kv``, in float32 and bfloat16."""
    for name in MECHANISMS:
        for dtype in (torch.float32,) if session.few else (torch.float32, torch.bfloat16):
            with session.gate(f"batch reader/{name}/{dtype}".replace("torch.", "")) as gate:
                three = Decoders.of(name, dtype, session.device)
                plain, exact, _ = three.compute(alone)
                with torch.no_grad():
                    found = together(three.there)
                for user, logits in found.items():
                    gate.close(logits, plain[user], exact[user])


def memories(model: Any) -> list[Memory]:
    """Return a memory for each user, all of another length."""
    return [written(model, 2 + user % 3) for user in range(USERS)]


def alone(model: Any) -> dict[int, Tensor]:
    """Return the logits ``[1 + STEPS, V]`` of each user's prompt and steps, by the decoder with a cache of its own."""
    found, device = {}, model.get_input_embeddings().weight.device
    for user, memory in enumerate(memories(model)):
        output = model(ids(5 + user, 60 + user).to(device), memory=memory, use_cache=True)
        logits = [output.logits[0, -1]]
        for step in range(STEPS):
            token = ids(1, 100 * user + step).to(device)
            output = model(token, memory=memory, past_key_values=output.past_key_values)
            logits.append(output.logits[0, -1])
        found[user] = torch.stack(logits)
    return found


def together(model: Any) -> dict[int, Tensor]:
    """Return the same by one reader; users join one after the other, and leave when they are done."""
    reader, device = BatchReader(model), model.get_input_embeddings().weight.device
    waiting, users, found = list(enumerate(memories(model))), dict[Any, int](), dict[int, list[Tensor]]()
    while waiting or reader.rows:
        for user, memory in waiting[:2]:
            (row,) = reader.join([(memory, ids(5 + user, 60 + user)[0].to(device))], max_new_tokens=STEPS + 1)
            if row.error is not None:
                raise row.error
            users[row], found[user] = user, [row.logits]
        waiting = waiting[2:]
        reader.leave([row for row in reader.rows if len(found[users[row]]) > STEPS])
        rows = reader.rows
        if rows:
            tokens = [int(ids(1, 100 * users[row] + len(found[users[row]]) - 1)) for row in rows]
            for row, logits in zip(rows, reader.step(tokens), strict=True):
                found[users[row]].append(logits)
    return {user: torch.stack(logits) for user, logits in found.items()}
