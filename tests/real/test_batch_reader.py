"""SmolLM2 answers several users at once, each from notes of their own, as it answers each alone."""

from __future__ import annotations

import copy

import torch

import mplus

USERS = {
    "anna": ("My bicycle key hangs behind the kitchen door.", "Where is the key of my bicycle?"),
    "bob": ("Maria Keller has moved and now lives in Lisbon, close to the station.", "Where does Maria live?"),
    "carl": ("", "What is two plus two?"),
}
NEW = 12


def test_users_with_notes_of_their_own(decoder, tokenizer):
    model = mplus.wrap(copy.deepcopy(decoder), mplus.MPlusConfig(mechanism="kv")).eval()
    asked, expected = [], []
    for name, (note, question) in USERS.items():
        memory = model.new_memory(tokenizer=tokenizer)
        if note:
            memory.write(note, source=name)
        messages = [{"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
        output = model.generate(**prompt, memory=memory, max_new_tokens=NEW, do_sample=False, pad_token_id=0)
        asked.append((memory, prompt["input_ids"]))
        expected.append(output[0, prompt["input_ids"].shape[1] :].tolist())
    reader = mplus.BatchReader(model)
    assert not reader.slow_because
    joining = reader.begin(asked[:1], max_new_tokens=NEW)
    while not joining.advance(16):  # a chat's prompt is some 40 tokens long
        pass
    rows = joining.rows + reader.join(asked[1:], max_new_tokens=NEW)
    assert [{one.source for layer in row.sources for one in layer} for row in rows] == [{"anna"}, {"bob"}, set()]
    said = {row: [int(row.logits.argmax())] for row in rows}
    for _ in range(NEW - 1):
        logits = reader.step([said[row][-1] for row in reader.rows])
        for row, token in zip(reader.rows, logits.argmax(-1).tolist(), strict=True):
            said[row].append(token)
    # ``generate`` ends behind the end token.
    assert [said[row][: len(own)] for row, own in zip(rows, expected, strict=True)] == expected
    assert torch.isfinite(logits).all()
