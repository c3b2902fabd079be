"""Gates of whole reads and writes: M+ and ``kv`` on the device against the CPU, alone and in batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.gates.decoders import MECHANISMS, Decoders, ids, wrapped, written
from benchmarks.gpu.session import Session
from mplus.testing.rounding import allowed, error

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
CHUNKS = 6
RETRIEVED = 12


def reads_and_writes(session: Session) -> None:
    """Open all gates of this file."""
    chunks = 4 if session.few else CHUNKS
    for name in MECHANISMS:
        for dtype in DTYPES[: 1 if session.few else 3]:
            with session.gate(f"{name}/write and read/{dtype}".replace("torch.", "")) as gate:
                three = Decoders.of(name, dtype, session.device)
                plain, exact, there = three.compute(lambda model: read(model, chunks))
                for one, truth, found in zip(plain, exact, there, strict=True):
                    gate.close(found, one, truth)
                if dtype == torch.float32:
                    gate.holds(matters(three, plain[0], exact[0]), "the memory makes no difference")
        with session.gate(f"{name}/batch, padded") as gate:
            three = Decoders.of(name, torch.float32, session.device)
            plain, exact, there = three.compute(lambda model: read_padded(model, chunks))
            gate.close(there, plain, exact)
        with session.gate(f"{name}/moved to the device after wrapping") as gate:
            moved = wrapped(name, torch.float32, torch.device("cpu")).to(session.device)
            plain, exact, there = three.compute(lambda model: read(model, chunks))
            with torch.no_grad():
                gate.close(read(moved, chunks)[0], plain[0], exact[0])
        with session.gate(f"{name}/generate") as gate:
            plain, _, there = three.compute(lambda model: generated(model, chunks))
            gate.same(there, plain, "the generated ids")
    with session.gate("mplus/the same rows are retrieved") as gate:
        three = Decoders.of("mplus", torch.float32, session.device, retrieved_tokens=RETRIEVED)
        plain, _, there = three.compute(lambda model: retrieved(model, chunks))
        gate.holds(there == plain, f"retrieved are {there}, on the CPU {plain}")
    with session.gate("mplus/rows on the host, decoder on the device") as gate:
        three = Decoders.of("mplus", torch.float32, session.device)
        plain, exact, there = three.compute(lambda model: read(model, chunks, device="cpu"))
        gate.close(there[0], plain[0], exact[0])
    with session.gate("mplus/rows kept projected, by the gathering kernel") as gate:
        plain, exact, there = three.compute(lambda model: read(model, chunks, memory_rows="projected"))
        gate.close(there[0], plain[0], exact[0])
    with session.gate("mplus/adapters of PEFT") as gate:
        plain, exact, there = Decoders.of("mplus", torch.float32, session.device).compute(
            lambda model: read(with_adapter(model), chunks)
        )
        gate.close(there[0], plain[0], exact[0])


def matters(three: Decoders, plain: Tensor, exact: Tensor) -> bool:
    """Return whether the logits of a prompt are others with a memory than without one, beyond rounding."""
    with torch.no_grad():
        return error(three.plain(ids(11, 100)).logits, exact) > 100 * allowed(plain, exact)


def read(model: Any, chunks: int, **settings: Any) -> tuple[Tensor, Tensor]:
    """Write, and return the logits of a prompt and those of a token behind it."""
    memory = written(model, chunks, **settings)
    prompt, device = ids(11, 100), model.get_input_embeddings().weight.device
    output = model(prompt.to(device), memory=memory, use_cache=True)
    behind = model(ids(1, 101).to(device), memory=memory, past_key_values=output.past_key_values)
    return output.logits, behind.logits


def read_padded(model: Any, chunks: int) -> Tensor:
    """Return the logits of two prompts, one padded on the left, each with a memory of its own."""
    memory, device = written(model, chunks, rows=2), model.get_input_embeddings().weight.device
    prompts, mask = ids(9, 100, rows=2), torch.ones(2, 9, dtype=torch.int64)
    mask[1, :4] = 0
    logits = model(prompts.to(device), attention_mask=mask.to(device), memory=memory).logits
    return logits[mask.bool().to(device)]  # type: ignore[no-any-return]


def generated(model: Any, chunks: int) -> Tensor:
    """Generate some tokens behind a prompt, retrieving anew on the way."""
    memory, device = written(model, chunks), model.get_input_embeddings().weight.device
    prompt = ids(11, 100).to(device)
    options: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    return model.generate(prompt, memory=memory, pad_token_id=0, **options)  # type: ignore[no-any-return]


def retrieved(model: Any, chunks: int) -> list[list[tuple[int, str | None]]]:
    """Return age and source of the rows that a prompt retrieves, in each layer."""
    memory, device = written(model, chunks), model.get_input_embeddings().weight.device
    prompt = ids(11, 100).to(device)
    found = model.generate(
        prompt,
        memory=memory,
        max_new_tokens=1,
        do_sample=False,
        attention_mask=torch.ones_like(prompt),
        pad_token_id=0,
        return_dict_in_generate=True,
        output_sources=True,
    )
    return [[(row.age, row.source) for row in layer] for layer in found.memory_sources[0]]


def with_adapter(model: Any) -> Any:
    """Return the decoder with a random LoRA adapter of PEFT around it."""
    from peft import LoraConfig, get_peft_model

    tuned: Any = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(9)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name and ".default." in name:
            parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
    return tuned
