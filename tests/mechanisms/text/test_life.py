"""What the conformance suite does not see of a memory of text: other decoders, damage, saved models, copies."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
from typing import TYPE_CHECKING, Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from typer.testing import CliRunner

import mplus
from mplus.cli import app
from mplus.errors import ConfigError, InputError, MemoryMismatchError, NotSupported
from mplus.evaluation.harm import harm
from mplus.hf.decoders.tokenizers import train_tokenizer
from mplus.memory.format.offline import saved_sources
from mplus.memory.format.repair import repair
from mplus.memory.format.verify import verify
from mplus.training.recipe.files import read_recipe
from tests.mechanisms.text.decoders import (
    CAT,
    KEY,
    continued,
    logits,
    mamba,
    noted,
    prompt,
    tokenizer,
    with_notes,
    wrapped,
)

if TYPE_CHECKING:
    from pathlib import Path

SECRET = "Zubrin hides the treasure."


def texts(memory: Any, row: int = 0) -> list[str]:
    return [entry.fields[0] for entry in memory.states[row].entries()]


def bytes_in(folder: Path) -> bytes:
    return b"\0".join(file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file())


class TestOtherDecoders:
    def test_a_memory_of_a_llama_is_read_by_a_mamba_with_another_tokenizer(self, tmp_path: Path) -> None:
        noted(with_notes(), KEY, CAT).save(tmp_path / "notes")
        words = train_tokenizer([KEY, CAT, "Where is the key?"], 300)
        model = wrapped(mamba())
        memory = mplus.Memory.load(tmp_path / "notes", model, tokenizer=words)
        assert texts(memory) == [KEY, CAT]
        ids = words("Where is the key", return_tensors="pt", add_special_tokens=False)["input_ids"]
        front = words(f"{KEY}\n", add_special_tokens=False)["input_ids"]
        whole = torch.cat([torch.tensor([front]), ids], 1)
        found = model(ids, memory=memory, output_sources=True, query_tokens=4)
        assert [one.source for one in found.memory_sources[0][0]][-1] == "s0"
        assert found.logits.shape[1] == ids.shape[1]
        only = mplus.Memory.load(tmp_path / "notes", model, tokenizer=words)
        only.forget("s1")
        assert torch.equal(logits(model, ids, only), logits(model, whole)[:, -ids.shape[1] :])

    def test_options_of_reading_may_differ(self, tmp_path: Path) -> None:
        noted(with_notes(), KEY, CAT).save(tmp_path / "notes")
        memory = mplus.Memory.load(tmp_path / "notes", wrapped(passages=1, chunk_tokens=30), tokenizer=tokenizer())
        assert texts(memory) == [KEY, CAT]

    def test_a_memory_of_rows_and_one_of_text_do_not_fit_each_other(self, tmp_path: Path) -> None:
        noted(with_notes(), KEY).save(tmp_path / "notes")
        latent = wrapped(None, "kv")
        with pytest.raises(MemoryMismatchError, match="mechanism is 'notes' in the file"):
            mplus.Memory.load(tmp_path / "notes", latent)
        other = latent.new_memory(tokenizer=tokenizer())
        other.write(KEY)
        other.save(tmp_path / "rows")
        with pytest.raises(MemoryMismatchError, match=r"mechanism is .*kv.* in the file and 'notes' in the model"):
            mplus.Memory.load(tmp_path / "rows", with_notes())
        with pytest.raises(MemoryMismatchError, match="belongs to another model"):
            with_notes()(prompt(), memory=other)


class TestForgetting:
    def test_rebuilding_is_not_needed(self) -> None:
        memory = noted(with_notes(), KEY, CAT)
        with pytest.raises(InputError, match="mode='rebuild' is for memories of rows"):
            memory.forget("s0", mode="rebuild")
        report = memory.forget("s0", keep_name=True)
        assert (report.rows, report.held["entries"]) == (1, (1,))
        assert (memory.forgotten(), texts(memory)) == (["s0"], [CAT])

    def test_reset_leaves_nothing(self, tmp_path: Path) -> None:
        with mplus.Memory.open(tmp_path / "notes", with_notes(), tokenizer=tokenizer()) as memory:
            memory.write(SECRET, source="s0")
            memory.reset()
            assert texts(memory) == []
            assert b"Zubrin" not in bytes_in(tmp_path / "notes")
            memory.write(KEY, source="s1")
            assert texts(memory) == [KEY]


class TestFiles:
    def test_what_is_refused_when_it_is_opened(self, tmp_path: Path) -> None:
        noted(with_notes(), KEY).save(tmp_path / "notes")
        for given in ({"store": "ram"}, {"eviction": "lru"}, {"bytes_budget": "1MiB"}):
            with pytest.raises(ConfigError, match="means nothing to the mechanism 'notes'"):
                mplus.Memory.load(tmp_path / "notes", with_notes(), **given)
            with pytest.raises(ConfigError, match="means nothing to the mechanism 'notes'"):
                mplus.Memory.open(tmp_path / "live", with_notes(), **given)
        with pytest.raises(ConfigError, match="keep_text means nothing to the mechanism 'notes'"):
            mplus.Memory.open(tmp_path / "live", with_notes(), keep_text=True)

    @pytest.mark.parametrize("kind", ["saved", "live"])
    def test_a_source_is_forgotten_without_a_decoder(self, tmp_path: Path, kind: str) -> None:
        folder = tmp_path / "notes"
        with mplus.Memory.open(folder, with_notes(), tokenizer=tokenizer()) as memory:
            for number, text in enumerate((KEY, SECRET, CAT)):
                memory.write(text, source=f"s{number}")
            if kind == "saved":
                memory.save(tmp_path / "saved")
        folder = tmp_path / "saved" if kind == "saved" else folder
        assert b"Zubrin" in bytes_in(folder)
        result = CliRunner().invoke(app, ["memory", "forget", str(folder), "s1"])
        assert result.exit_code == 0, result.output
        assert b"Zubrin" not in bytes_in(folder)
        assert [source.name for source in saved_sources(folder)[0]] == ["s0", "s2"]
        shown = CliRunner().invoke(app, ["memory", "show", str(folder)])
        assert "2 entries" in shown.output

    def test_the_journal_grows_with_what_is_written_and_not_with_what_there_is(self, tmp_path: Path) -> None:
        """Each record holds the last block anew, and no block that is full."""
        with mplus.Memory.open(tmp_path / "notes", with_notes(), tokenizer=tokenizer()) as memory:
            sizes = [0]
            for number in range(120):
                memory.write(f"{KEY} {CAT} " * 8 + f"number {number}", source="book")
                sizes.append(memory.directory.journal_bytes)
            assert len(memory.states[0].blocks) > 3
        records = [behind - before for before, behind in itertools.pairwise(sizes)]
        assert max(records[60:]) < 1.5 * max(records[:60])

    @pytest.mark.parametrize("kind", ["saved", "live"])
    def test_damage_is_found_and_what_is_sound_is_saved(self, tmp_path: Path, kind: str) -> None:
        many = [f"Note {number}. " + "x" * 3000 for number in range(12)]
        with mplus.Memory.open(tmp_path / "live", wrapped(chunk_tokens=5000), tokenizer=tokenizer()) as memory:
            for number, text in enumerate(many):
                memory.write(text, source=f"s{number}")
            memory.save(tmp_path / "saved")
        folder = tmp_path / kind
        assert verify(folder) == []
        (file,) = [one for one in folder.iterdir() if b"Note 3." in one.read_bytes()]
        content = bytearray(file.read_bytes())
        content[content.index(b"Note 3.") + 1] ^= 1
        file.write_bytes(content)
        assert verify(folder)
        lost = repair(folder, tmp_path / "repaired")
        assert any("entries, whose texts are lost" in sentence for sentence in lost)
        model = with_notes()
        left = texts(mplus.Memory.load(tmp_path / "repaired", model))
        assert 0 < len(left) < len(many)
        assert set(left) < {text.strip() for text in many}

    def test_a_manifest_says_what_it_is_bound_to(self, tmp_path: Path) -> None:
        noted(with_notes(), KEY).save(tmp_path / "notes")
        fingerprint = json.loads((tmp_path / "notes" / "manifest.json").read_text())["fingerprint"]
        assert {name: fact for name, fact in fingerprint.items() if name != "made_with"} == {
            "layers": 1,
            "hidden_size": 0,
            "key_size": 0,
            "mechanism": "notes",
        }


class TestModels:
    def test_a_wrapped_decoder_is_saved_and_loaded(self, tmp_path: Path) -> None:
        model = wrapped(passages=2, place="turn", chunk_tokens=50)
        model.save_pretrained(tmp_path / "model", save_base=True)
        loaded = mplus.from_pretrained(tmp_path / "model", dtype=torch.float64)
        assert loaded.mplus_config == model.mplus_config
        memory = noted(model, KEY)
        memory.save(tmp_path / "notes")
        again = mplus.Memory.load(tmp_path / "notes", loaded, tokenizer=tokenizer())
        assert torch.equal(continued(loaded, prompt(), again), continued(model, prompt(), memory))
        assert "notes" in (tmp_path / "model" / "README.md").read_text()

    def test_unwrap_takes_everything_off(self) -> None:
        model = wrapped()
        before, cls = logits(model, prompt()), type(model)
        memory = noted(model, KEY)
        model.generation_config.memory = memory
        mplus.unwrap(model)
        assert type(model) is cls.__mplus_base__
        assert not {name for name in vars(model) if "mplus" in name}
        assert getattr(model.generation_config, "memory", None) is None
        assert torch.equal(model(prompt()).logits, before)
        with pytest.raises(MemoryMismatchError, match="is no longer wrapped"):
            memory.write(CAT)
        with pytest.raises(NotSupported, match="is wrapped already"):
            mplus.wrap(wrapped(), mplus.MPlusConfig(mechanism="notes"))

    def test_no_layer_weight_or_module_is_touched(self) -> None:
        model = mamba()
        before = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
        weights = {name: id(weight) for name, weight in model.named_parameters()}
        wrapped(model)
        after = {name: (type(module), set(vars(module))) for name, module in model.named_modules()}
        assert {name for name in after if after[name] != before[name]} == {""}
        assert after[""][1] - before[""][1] == {"mplus_engine", "mplus_installed"}
        assert {name: id(weight) for name, weight in model.named_parameters()} == weights

    @pytest.mark.parametrize("way", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies_of_a_decoder_have_memories_of_their_own(self, way: Any) -> None:
        model = wrapped(mamba())
        twin = way(model)
        memory, other = noted(model, KEY), noted(twin, KEY)
        assert torch.equal(logits(twin, prompt(), other), logits(model, prompt(), memory))
        with pytest.raises(MemoryMismatchError, match="belongs to another model"):
            twin(prompt(), memory=memory)

    def test_a_model_of_peft(self, tmp_path: Path) -> None:
        model = get_peft_model(with_less(), LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
        mplus.wrap(model, {"mechanism": "notes"})
        memory, expected = noted(model, KEY), continued(with_notes(), prompt(), noted(with_notes(), KEY))
        settings = {"max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
        assert torch.equal(model.generate(input_ids=prompt(), memory=memory, **settings), expected)
        assert torch.equal(
            model(input_ids=prompt(), memory=memory).logits, logits(with_notes(), prompt(), noted(with_notes(), KEY))
        )
        model.save_pretrained(tmp_path / "model", save_base=True)
        loaded = mplus.from_pretrained(tmp_path / "model", dtype=torch.float64)
        assert torch.equal(loaded.generate(input_ids=prompt(), memory=noted(loaded, KEY), **settings), expected)
        plain = mplus.unwrap(model)
        assert not hasattr(plain.get_base_model(), "mplus_engine")

    def test_a_copy_on_another_device_or_in_another_dtype_is_a_copy(self) -> None:
        memory = noted(with_notes(), KEY)
        assert texts(memory.to(torch.bfloat16)) == [KEY]
        memory.to(torch.bfloat16).write(CAT)
        assert memory.nbytes > 0
        assert "1 entries" in repr(memory)

    def test_it_is_refused_where_a_memory_of_rows_is_trained(self, tmp_path: Path) -> None:
        text = tmp_path / "text.txt"
        text.write_text("the dragon saw a red ball . " * 60)
        data = {"kind": "documents", "paths": [str(text)], "chunk_tokens": 16, "target_tokens": 16}
        objective = {"name": "single_context", "data": "text", "chunks": 2}
        table = {
            "name": "x",
            "streams": 2,
            "model": {"path": "stories260K"},
            "memory": {"mechanism": "notes"},
            "data": {"text": data},
            "stages": [{"name": "s", "steps": 1, "objectives": [objective]}],
        }
        with pytest.raises(ConfigError, match="got 'notes', whose memories are made of text"):
            read_recipe(table)


def test_what_knows_rows_only_refuses_it_by_name() -> None:
    model = with_notes()
    with pytest.raises(NotSupported, match="those of the mechanism 'notes' are made of text"):
        harm(model, tokenizer(), KEY, CAT)
    with pytest.raises(NotSupported, match="memories of the mechanism 'notes' are made of text"):
        mplus.StaticReader(model)
    with pytest.raises(NotSupported, match="are made of text and have no such rows"):
        model.mplus_engine.write([], prompt())
    with pytest.raises(NotSupported, match="are made of rows, not of text"):
        wrapped(None, "kv").mplus_engine.write_text([], [])


def with_less() -> Any:
    """A decoder that is not wrapped."""
    return mplus.unwrap(wrapped())
