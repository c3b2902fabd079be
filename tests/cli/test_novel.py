"""What the package carries: the novel and the decoder, unaltered and with their papers."""

from __future__ import annotations

import gzip
import hashlib
import re

import pytest

from mplus.cli.demo.novel import tokenize
from mplus.hf.pretrained.shipped import NOVEL, STORIES260K, chapters, load_decoder, load_tokenizer


@pytest.mark.parametrize("folder", [STORIES260K, NOVEL.parent], ids=["stories260K", "novels"])
def test_files_are_those_of_the_provenance(folder):
    stated = dict(
        reversed(line.split()[1:])
        for line in (folder / "PROVENANCE.txt").read_text(encoding="utf-8").partition("\nFile")[2].splitlines()
        if line.startswith("  sha256 ")
    )
    present = {file.name for file in folder.iterdir()} - {"PROVENANCE.txt", "LICENSE"}
    assert stated.keys() == present
    for name, digest in stated.items():
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest, name


def test_the_decoder_has_its_licence():
    licence = (STORIES260K / "LICENSE").read_text(encoding="utf-8")
    assert licence.startswith("MIT License\n\nCopyright (c) 2023 Clemens Akens\n")


def test_the_decoder_tells_what_it_is_known_to_tell():
    decoder, tokenizer = load_decoder(), load_tokenizer()
    assert sum(parameter.numel() for parameter in decoder.parameters()) == 260_032
    prompt = tokenizer("", return_tensors="pt")
    told = decoder.generate(**prompt, max_new_tokens=24, do_sample=False)[0]
    # The beginning of the greedy text that was published with the decoder.
    assert tokenizer.decode(told, skip_special_tokens=True).startswith(
        "Once upon a time, there was a little girl named Lily"
    )


def test_chapters():
    novel = gzip.decompress(NOVEL.read_bytes()).decode("utf-8")
    parts = chapters()
    assert len(parts) == 27 == len(re.findall("^CHAPTER ", novel, re.MULTILINE))
    assert novel == "THE SECRET GARDEN\n\n\n\n\n" + "".join(part.text for part in parts)
    assert parts[0].name == "chapter 1: THERE IS NO ONE LEFT"
    assert parts[26].name == "chapter 27: IN THE GARDEN"
    for number, part in enumerate(parts, 1):
        assert part.text.startswith("CHAPTER ")
        assert part.name.startswith(f"chapter {number}: ")


def test_tokens():
    tokenizer, parts = load_tokenizer(), chapters()
    texts = tokenize(parts, tokenizer)
    assert sum(len(ids) for _, ids in texts) >= 160_000
    assert [name for name, _ in texts] == [part.name for part in parts]
    assert tokenizer.decode(texts[4][1]).strip() == parts[4].text.strip()
    assert all(len(ids) >= 16 for _, ids in texts)


@pytest.mark.parametrize("limit", [600, 9_000])
def test_a_limit_counts_all_chapters(limit):
    tokenizer = load_tokenizer()
    whole, cut = tokenize(chapters()[:3], tokenizer), tokenize(chapters(), tokenizer, limit)
    assert sum(len(ids) for _, ids in cut) == limit
    for (name, ids), (whole_name, whole_ids) in zip(cut, whole, strict=False):
        assert name == whole_name
        assert ids.tolist() == whole_ids[: len(ids)].tolist()
