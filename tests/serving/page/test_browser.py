"""The page in Chromium: what a person does there, by its labels, with the mouse or with the keyboard alone."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

import pytest
from playwright.sync_api import expect

from mplus.hf.pretrained.smollm2 import smollm2_folder
from mplus.serving.engine.decoder import ServedDecoder
from tests.serving.served import served

KEPT = bool(os.environ.get("MPLUS_SCREENSHOTS"))
ASSETS = Path(__file__).parents[3] / "docs" / "assets"
INJECTED = "<img src=x onerror=\"document.title='taken over'\">"
STORY = (
    "Once upon a time there was a girl named Lily. She found a red stone in the garden and gave it to her friend Tom. "
)
LETTER = "Tom had a boat on the lake. He took Lily to the island, and they saw a big bird with blue wings on a tree. "
FOCUSED = """() => {
    const { id, tagName, textContent } = document.activeElement;
    return tagName === "BODY" ? null : id || textContent.trim();
}"""
NAME = "field => field.labels?.[0]?.textContent || field.getAttribute('aria-label') || field.textContent"
DROPPED = """([name, text]) => {
    const data = new DataTransfer();
    data.items.add(new File([text], name));
    return data;
}"""
TOO_WIDE = "Array.from(document.querySelectorAll('body *')).filter(e => e.getBoundingClientRect().right > 360).length"


def write(page, source, text):
    page.get_by_label("Name of the source").fill(source)
    page.get_by_label("Text, or drop a text file here").fill(text)
    page.get_by_role("button", name="Write", exact=True).click()
    expect(page.locator("#write-note")).to_contain_text("Written:")


def ask(page, question, tokens=8):
    """Ask by the keyboard."""
    if not page.get_by_label("At most").is_visible():
        page.get_by_text("More", exact=True).click()
    page.get_by_label("At most").fill(str(tokens))
    page.get_by_label("Your message").fill(question)
    page.keyboard.press("Enter")


def answered(page):
    expect(page.get_by_role("button", name="Send")).to_be_visible(timeout=120_000)
    return page.locator(".answer").last


def make(page, name):
    page.get_by_role("button", name="New", exact=True).click()
    page.get_by_role("textbox", name="Its name").fill(name)
    page.get_by_role("button", name="Make").click()
    expect(page.get_by_label("Memory in use")).to_have_value(name)


def test_a_source_is_written_comes_back_and_is_forgotten(tab):
    page = tab()
    make(page, "injected")
    write(page, INJECTED, STORY)
    expect(page.get_by_role("button", name=f"Forget {INJECTED}")).to_be_visible()
    ask(page, "Lily found a red stone in the")
    expect(answered(page).get_by_role("cell", name=INJECTED)).to_be_visible()
    expect(answered(page)).to_contain_text("8 tokens")
    page.get_by_role("button", name=f"Forget {INJECTED}").click()
    expect(page.get_by_role("dialog")).to_contain_text("copies of this memory, and files exported from it")
    page.get_by_role("dialog").get_by_role("button", name="Forget").click()
    expect(page.get_by_text("Nothing has been written yet.")).to_be_visible()
    expect(page.locator("#write-note")).to_contain_text("is forgotten")
    expect(page).to_have_title("mplus")
    assert page.locator("img").count() == 0


def test_an_answer_is_stopped_and_a_new_conversation_begun(tab):
    page = tab()
    ask(page, "One day, Lily", 400)
    expect(page.locator(".answer .said").last).to_contain_text(re.compile(r"\w+ \w+"))
    page.keyboard.press("Escape")
    expect(answered(page)).to_contain_text("stopped: not remembered")
    page.get_by_role("button", name="New conversation").click()
    expect(page.locator(".answer")).to_have_count(0)
    ask(page, "Tom had a", 400)
    page.get_by_role("button", name="Stop").click()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(page.get_by_label("Your message")).to_be_focused()


def test_what_was_said_is_remembered_where_that_is_asked_for(tab):
    page = tab()
    make(page, "told")
    page.get_by_label("Remember").select_option("what I say")
    ask(page, STORY)
    expect(page.locator("#sources .name")).to_have_text(re.compile(r"^chat \d{4}-"))
    page.get_by_label("What would a question bring back?").fill("Lily found a red stone")
    page.get_by_role("button", name="Look up").click()
    expect(page.locator("#found")).to_contain_text("red stone in the garden")


def test_a_memory_is_copied_exported_imported_and_deleted(tab, tmp_path):
    page = tab()
    make(page, "first")
    write(page, "story.txt", STORY)
    page.get_by_role("button", name="Copy").click()
    page.get_by_role("textbox", name="Its name").fill("second")
    page.get_by_role("dialog").get_by_role("button", name="Copy").click()
    expect(page.get_by_label("Memory in use")).to_have_value("second")
    with page.expect_download() as download:
        page.get_by_role("button", name="Export", exact=True).click()
    download.value.save_as(tmp_path / "exported")
    page.get_by_label("Import an exported memory").set_input_files(tmp_path / "exported")
    page.get_by_role("textbox", name="Its name").fill("third")
    page.get_by_role("dialog").get_by_role("button", name="Import").click()
    expect(page.get_by_label("Memory in use")).to_have_value("third")
    expect(page.locator("#sources .name")).to_have_text("story.txt")
    page.get_by_role("button", name="Show the text of story.txt").click()
    expect(page.get_by_role("dialog")).to_contain_text("She found a red stone")
    page.get_by_role("dialog").get_by_role("button", name="Close").click()
    page.get_by_role("button", name="Delete").click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(page.get_by_label("Memory in use")).to_have_value("default")
    options = page.get_by_label("Memory in use").locator("option")
    assert {"first", "second"} <= set(options.all_text_contents())
    assert "third" not in options.all_text_contents()


def test_a_refused_import_leaves_no_memory_behind(tab, tmp_path):
    page = tab(expected=["409", "400"])
    (tmp_path / "garbage").write_bytes(b"no memory")
    page.get_by_label("Import an exported memory").set_input_files(tmp_path / "garbage")
    page.get_by_role("textbox", name="Its name").fill("garbage")
    page.get_by_role("dialog").get_by_role("button", name="Import").click()
    expect(page.locator("#memory-note")).to_have_class(re.compile("bad"))
    assert "garbage" not in page.get_by_label("Memory in use").locator("option").all_text_contents()


def test_a_text_file_is_dropped_and_another_file_is_refused(tab):
    page = tab()
    page.dispatch_event("#write", "drop", {"dataTransfer": page.evaluate_handle(DROPPED, ["notes.txt", STORY])})
    expect(page.get_by_label("Name of the source")).to_have_value("notes.txt")
    expect(page.get_by_label("Text, or drop a text file here")).to_have_value(STORY)
    page.dispatch_event("#write", "drop", {"dataTransfer": page.evaluate_handle(DROPPED, ["picture.png", "\0\1"])})
    expect(page.locator("#write-note")).to_have_text("picture.png is no text in UTF-8.")


def test_a_wrong_key_is_asked_for_again_and_the_right_one_is_nowhere_but_in_the_tab(tab, server):
    page = tab(key="mp-wrong", expected=["401"])
    expect(page.get_by_role("dialog")).to_contain_text("The server does not know this key.")
    page.get_by_role("textbox", name="Key").fill(server.key)
    page.keyboard.press("Enter")
    expect(page.get_by_label("Memory in use")).to_have_value("default")
    assert page.url == server.address
    assert page.evaluate("localStorage.length + document.cookie.length") == 0
    page.reload()
    expect(page.get_by_label("Memory in use")).to_have_value("default")
    page.get_by_role("button", name="Sign out").click()
    expect(page.get_by_role("dialog", name="Your key")).to_be_visible()


def test_everything_is_reached_by_the_keyboard_and_has_a_name(tab):
    page = tab()
    page.evaluate("document.body.tabIndex = -1; document.body.focus()")
    reached = []
    while len(reached) < 40 and None not in reached:
        page.keyboard.press("Tab")
        reached.append(page.evaluate(FOCUSED))
    wanted = ["question", "use-memory", "remember", "new-chat", "memory", "make", "fork", "export", "import", "delete"]
    wanted += ["source", "text", "file", "write-button", "query"]
    assert reached[0] == "Go to the question"
    assert [name for name in reached if name in wanted] == wanted
    for field in page.locator("button:visible, input:visible, select:visible, textarea:visible").all():
        assert field.evaluate(NAME).strip(), field


def test_it_fits_on_a_phone(tab):
    page = tab(viewport={"width": 360, "height": 700})
    for shown, hidden, name in (("main", "aside", "Chat"), ("aside", "main", "Memory")):
        page.get_by_role("button", name=name, exact=True).click()
        expect(page.locator(shown)).to_be_visible()
        expect(page.locator(hidden)).to_be_hidden()
        assert page.evaluate(TOO_WIDE) == 0


NOTES = {
    "diary, 3 May": "I met Maria Keller again today. She has moved and now lives in Lisbon.",
    "diary, 4 May": "Note to self: Pedro Alvarez works as a baker and starts every day at six.",
}


@pytest.fixture
def chat_model(tmp_path):
    """The server of the screenshot: SmolLM2, where it is there and the screenshot is to be kept."""
    folder = smollm2_folder() if KEPT else None
    decoder = None
    if folder is not None and folder.is_dir():
        decoder = ServedDecoder.load(str(folder), tmp_path, mechanism="kv", served_name="smollm2")
    with served(tmp_path, keys=False, decoder=decoder) as running:
        yield running


def test_a_screenshot_for_the_docs(chromium, chat_model, tmp_path):
    """Kept where MPLUS_SCREENSHOTS is set, as `make test-serving` does: each run would change the file else."""
    with contextlib.closing(chromium.new_context(viewport={"width": 1120, "height": 640})) as context:
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.goto(chat_model.address)
        make(page, "anna")
        for source, text in NOTES.items():
            write(page, source, text)
            expect(page.get_by_role("button", name=f"Forget {source}")).to_be_visible()
        page.locator("#write-note").evaluate("note => note.hidden = true")
        for question in ("In which city does Maria Keller live?", "What is the capital of France?"):
            ask(page, question, 40)
            expect(answered(page)).to_contain_text("tokens", timeout=120_000)
        page.get_by_text("More", exact=True).click()
        file = (ASSETS if KEPT else tmp_path) / "page.png"
        page.screenshot(path=file)
    assert file.stat().st_size < 200_000
