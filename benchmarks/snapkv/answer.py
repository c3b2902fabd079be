"""Answer the questions of a retention run with SnapKV; needs requirements.txt, not mplus.

The questions come from ``mplus eval retention --export``, or ``mplus eval notes --export``; see README.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from kvpress import SnapKVPress
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache

FORMAT = 1
WINDOW = 64
"""Tokens at the end of the text whose attention decides what is kept (kvpress's default)."""


def main() -> None:
    """Read the questions, write the answers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("questions", type=Path)
    parser.add_argument("answers", type=Path)
    parser.add_argument("--model", required=True, help="name or folder of the plain decoder")
    parser.add_argument("--budget", type=int, required=True, help="tokens kept of what was told, per layer and head")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16, float16")
    options = parser.parse_args()
    if options.budget < 2:
        parser.error(f"--budget must be at least 2, got {options.budget}")
    head, *episodes = [json.loads(line) for line in options.questions.read_text(encoding="utf-8").splitlines()]
    if head.get("format") != FORMAT:
        parser.error(f"{options.questions} must be a file of questions in format {FORMAT}")
    dtype = options.dtype if options.dtype == "auto" else getattr(torch, options.dtype)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=dtype).to(options.device).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    found = list(answered(model, tokenizer, head, episodes, options.budget))
    facts = {
        "format": FORMAT,
        "digest": head["digest"],
        "press": "SnapKV",
        "budget": options.budget,
        "window": min(WINDOW, options.budget // 2),
        "answers_after_cut_text": sum(one.pop("cut") for one in found),
        **{name: version(name) for name in ("kvpress", "transformers", "torch")},
        "device": torch.cuda.get_device_name() if options.device.startswith("cuda") else "CPU",
    }
    lines = "".join(json.dumps(line) + "\n" for line in (facts, *found))
    options.answers.write_text(lines, encoding="utf-8")
    print(f"{len(found)} answers in {options.answers}")


def answered(
    model: Any, tokenizer: Any, head: dict[str, Any], episodes: list[dict[str, Any]], budget: int
) -> Iterator[dict[str, Any]]:
    """One line per question and age."""
    generation, separator = head["generation"], head["separator"]
    bos = [] if generation["bos"] is None else [generation["bos"]]
    bos = head.get("begin", bos)  # of a chat model, all that stands in front of what was told
    positions = getattr(model.config, "max_position_embeddings", None)

    def ids_of(text: str) -> list[int]:
        return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    for episode in episodes:
        for question in episode["questions"]:
            prompt = question.get("ids") or ids_of(question["prompt"])
            for age in question["ages"]:
                told = episode["passages"][: question["after"] + age + 1]
                text = [token for passage in told for token in ids_of(passage + separator)]
                room = len(text)
                if positions is not None:
                    room = max(positions - len(bos) - len(prompt) - generation["tokens"], 0)
                context = bos + text[max(len(text) - room, 0) :]
                made, kept, size = answer(model, context, prompt, generation["tokens"], budget)
                ends = [place for place, token in enumerate(made) if token in generation["eos"]]
                yield {
                    "id": f"{episode['episode']}-{question['number']}-{age}",
                    "text": tokenizer.decode(made[: ends[0]] if ends else made, skip_special_tokens=True),
                    "state_bytes": size,
                    "tokens_attended": kept + len(prompt),
                    "cut": len(text) > room,
                }


@torch.no_grad()
def answer(model: Any, context: list[int], prompt: list[int], tokens: int, budget: int) -> tuple[list[int], int, int]:
    """Greedy ids after the compressed ``context``; the tokens kept of it, and the bytes of their keys and values."""
    device, length = model.device, len(context)
    cache: Any = DynamicCache()
    window = min(WINDOW, budget // 2)
    press: Any = nullcontext()
    if length > budget:
        press = SnapKVPress(compression_ratio=1 - budget / length, window_size=window)(model)
    with press:
        model.model(input_ids=torch.tensor([context], device=device), past_key_values=cache)
    kept = cache.get_seq_length()
    size = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    made: list[int] = []
    text, place = prompt, length  # positions go on from the end of the whole text, not of what was kept
    for _ in range(tokens):
        ids = torch.tensor([text], device=device)
        at = torch.arange(place, place + len(text), device=device)[None]
        logits = model(input_ids=ids, past_key_values=cache, position_ids=at, logits_to_keep=1).logits
        made.append(int(logits[0, -1].argmax()))
        text, place = made[-1:], place + len(text)
    return made, kept, size


if __name__ == "__main__":
    main()
