"""OpenAI's client, and the programs that the page about many users shows, talk to a server."""

from __future__ import annotations

import asyncio
import contextlib
import io
import re
import runpy
import subprocess

import openai
import pytest

from tests.helpers.pages import DOCS, run_page
from tests.serving.served import served

STORY = "Once upon a time there was a girl named Lily. She found a red stone in the garden and gave it to Tom."


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    with served(tmp_path_factory.mktemp("memories"), keys=False) as running:
        yield running.address


@pytest.fixture
def programs(address, tmp_path, monkeypatch):
    """The folder of the page's programs, which ask the server of the tests."""
    monkeypatch.chdir(tmp_path)
    run_page(DOCS / "many-users.md")
    for file in tmp_path.iterdir():
        text = file.read_text(encoding="utf-8")
        assert "http://127.0.0.1:8000/" in text
        file.write_text(text.replace("http://127.0.0.1:8000/", address), encoding="utf-8")
    return tmp_path


def test_the_program_for_openais_client_does_what_the_page_says(programs):
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        runpy.run_path(str(programs / "ask_openai.py"))
    assert said.getvalue().startswith("from diary\n")
    assert len(said.getvalue().split()) > 5


def test_the_commands_for_curl_do_what_the_page_says(programs):
    done = subprocess.run(["bash", "-e", "ask.sh"], capture_output=True, text=True, check=True, cwd=programs)
    assert re.match(r'\{"tokens":\d+,"chunks":', done.stdout)
    assert '"object":"chat.completion"' in done.stdout


def test_many_clients_at_once_are_told_what_each_is_told_alone(address):
    async def story(client, memory):
        stream = await client.completions.create(
            model="stories260K", prompt="Lily found a red stone in the", max_tokens=16, temperature=0, stream=True,
            extra_body={"memory": memory},
        )  # fmt: skip
        return "".join([chunk.choices[0].text async for chunk in stream if chunk.choices])

    async def everybody():
        async with openai.AsyncOpenAI(base_url=f"{address}v1", api_key="none", max_retries=0) as client:
            for memory in ("one", "two"):
                await client.post("/memories", body={"id": memory}, cast_to=object)
            await client.post("/memories/one/write", body={"text": STORY, "source": "story"}, cast_to=object)
            alone = [await story(client, memory) for memory in ("one", "two")]
            together = await asyncio.gather(*(story(client, memory) for memory in ("one", "two") * 8))
        return alone, together

    alone, together = asyncio.run(everybody())
    assert together == alone * 8
    assert alone[0] != alone[1]


def test_an_error_is_one_that_the_client_knows(address):
    client = openai.OpenAI(base_url=f"{address}v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError) as raised:
        client.completions.create(model="stories260K", prompt="Lily", extra_body={"memory": "nobodys"})
    assert raised.value.param == "memory"
    with pytest.raises(openai.BadRequestError) as raised:
        client.completions.create(model="stories260K", prompt="Lily", temperature=3)
    assert raised.value.param == "temperature"
