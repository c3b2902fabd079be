"""Discovery of plug-ins: what packaging tools would find is found or listed as broken, and nothing breaks the rest."""

from __future__ import annotations

import importlib.metadata
import shutil
import sys
import tempfile
import textwrap
from pathlib import Path

import entrypoints
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mplus import plugins
from mplus.plugins import Plugin, discover

GROUP = "mplus.retrievers"


def install(site, folder, text, name=None, version="1.0", metadata="METADATA"):
    """Put a distribution into ``site``; ``folder`` as ``foo-1.0.dist-info``."""
    info = Path(site, folder)
    info.mkdir(parents=True)
    if isinstance(text, bytes):
        (info / "entry_points.txt").write_bytes(text)
    else:
        (info / "entry_points.txt").write_text(textwrap.dedent(text), encoding="utf-8")
    if name is not None:
        (info / metadata).write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n\nName: body\n")
    return info


def found(site, group=GROUP):
    return discover(group, [str(path) for path in ([site] if isinstance(site, (str, Path)) else site)])


def test_facts_of_a_plugin(tmp_path):
    install(
        tmp_path, "some_package-1.5.dist-info", f"[{GROUP}]\nmine = package.module:Mine.Inner\n", "some-package", "1.5"
    )
    [plugin] = found(tmp_path)
    assert plugin == Plugin(GROUP, "mine", "some-package", "1.5", "package.module:Mine.Inner")
    assert plugin.error is None
    assert plugin.origin == "some-package 1.5 (package.module:Mine.Inner)"


def test_loading(tmp_path, monkeypatch):
    (tmp_path / "loaded_plugin.py").write_text("class Outer:\n    class Inner:\n        pass\n")
    install(tmp_path, "a-1.dist-info", f"[{GROUP}]\nmine = loaded_plugin:Outer.Inner\n")
    monkeypatch.syspath_prepend(tmp_path)
    [plugin] = found(tmp_path)
    assert "loaded_plugin" not in sys.modules
    assert plugin.load().__qualname__ == "Outer.Inner"
    del sys.modules["loaded_plugin"]


def test_sys_path_is_the_default(tmp_path, monkeypatch):
    install(tmp_path, "a-1.dist-info", "[mplus.test_default]\nmine = m:A\n")
    assert discover("mplus.test_default") == []
    monkeypatch.syspath_prepend(tmp_path)
    assert [plugin.name for plugin in discover("mplus.test_default")] == ["mine"]


@pytest.mark.parametrize(
    "bad",
    [
        "[mplus.retrievers]\nbad = module:%(oops)s\n",
        "[mplus.retrievers]\nbad = 100%\n",
        "[mplus.retrievers]\nbad =\n",
        "[mplus.retrievers]\nbad\n",
        "[mplus.retrievers]\nbad = not a target\n",
        b"[mplus.retrievers]\nbad = m\xff\xfe:A\n",
    ],
    ids=["interpolation", "percent", "no value", "no sign", "no target", "not utf-8"],
)
def test_a_bad_line_is_listed_with_its_error_and_harms_nothing_else(tmp_path, bad):
    install(tmp_path, "a_bad-1.0.dist-info", bad + (b"good = m:B\n" if isinstance(bad, bytes) else "good = m:B\n"))
    install(tmp_path, "other-1.0.dist-info", f"[{GROUP}]\nother = n:C\n")
    broken, good, other = found(tmp_path)
    assert (broken.name, broken.distribution) == ("bad", "a_bad")
    assert "which must read name = module:attribute" in broken.error
    assert "a_bad-1.0.dist-info" in broken.error
    with pytest.raises(ValueError, match="must read name = module:attribute"):
        broken.load()
    assert (good.name, good.target, good.error) == ("good", "m:B", None)
    assert (other.name, other.target, other.error) == ("other", "n:C", None)


@pytest.mark.parametrize(
    "text",
    [
        "no section\n[mplus.retrievers]\nmine = m:A\n",
        "[mplus.retrievers]\nmine = m:A\n[unrelated]\nx = 100%\n",
        "[mplus.retrievers]\nmine = m:A\n[mplus.retrievers]\nmine = m:A\n",
        "[DEFAULT]\nleaks = m:B\n[mplus.retrievers]\nmine = m:A\n",
        "[mplus.retrievers]\n# a comment = m:B\n; another = m:B\n\nmine = m:A\n",
        "\ufeff[mplus.retrievers]\n  mine  =  m:A  \n",
        "[mplus.retrievers]\nmine = m : A\n",
        "[mplus.retrievers]\nmine = m: A\n",
        "[mplus.retrievers]\nmine = m:A [extra]\n",
        "[mplus.retrievers]\r\nmine = m:A\r\n",
    ],
)
def test_texts_that_mean_one_plugin(tmp_path, text):
    install(tmp_path, "a-1.dist-info", text.encode())
    [plugin] = found(tmp_path)
    assert (plugin.name, plugin.target, plugin.error) == ("mine", "m:A", None)


def test_a_name_may_begin_with_a_bracket(tmp_path):
    install(tmp_path, "a-1.dist-info", f"[{GROUP}]\n[odd = m:A\nmine = m:B\n")
    assert [plugin.name for plugin in found(tmp_path)] == ["[odd", "mine"]


def test_the_traps_are_real(tmp_path):
    """Should entrypoints ever read all this itself, mplus/plugins.py can become shorter."""
    install(tmp_path, "bad-1.0.dist-info", f"[{GROUP}]\nbad = 100%\n")
    install(tmp_path, "good-1.0.dist-info", f"[{GROUP}]\ngood = m:A\n")
    with pytest.raises(Exception, match="%"):
        entrypoints.get_group_all(GROUP, path=[str(tmp_path)])
    assert [plugin.name for plugin in found(tmp_path)] == ["bad", "good"]


def test_unreadable_file_is_listed(tmp_path):
    info = tmp_path / "a-1.dist-info"
    (info / "entry_points.txt").mkdir(parents=True)  # a folder cannot be read as a file, whoever asks
    install(tmp_path, "b-1.dist-info", f"[{GROUP}]\ngood = m:A\n")
    unreadable, good = found(tmp_path)
    assert unreadable.distribution == "a"
    assert "cannot be read" in unreadable.error
    assert good.name == "good"


@pytest.mark.parametrize(
    ("folder", "name", "version"),
    [
        ("foo-1.0.dist-info", "foo", "1.0"),
        ("foo_bar-1.0rc1.dist-info", "foo_bar", "1.0rc1"),
        ("foo-bar-1.0.egg-info", "foo-bar", "1.0"),
        ("foo-bar-1.0-py3.11.egg-info", "foo-bar", "1.0"),
        ("foo.egg-info", "foo", "(unknown version)"),
    ],
)
def test_identity_without_metadata(tmp_path, folder, name, version):
    install(tmp_path, folder, f"[{GROUP}]\nmine = m:A\n")
    [plugin] = found(tmp_path)
    assert (plugin.distribution, plugin.version) == (name, version)


@pytest.mark.parametrize("metadata", ["METADATA", "PKG-INFO"])
def test_identity_comes_from_metadata(tmp_path, metadata):
    install(tmp_path, "x-0.egg-info", f"[{GROUP}]\nmine = m:A\n", "Real-Name", "3.2", metadata)
    [plugin] = found(tmp_path)
    assert (plugin.distribution, plugin.version) == ("Real-Name", "3.2")


def test_names_that_share_a_beginning_do_not_hide_each_other(tmp_path):
    install(tmp_path, "foo-1.0.dist-info", f"[{GROUP}]\na = m:A\n", "foo")
    install(tmp_path, "foo-bar-1.0.egg-info", f"[{GROUP}]\nb = m:B\n", "foo-bar", metadata="PKG-INFO")
    install(tmp_path, "foo-baz-1.0.egg-info", f"[{GROUP}]\nc = m:C\n", "foo-baz", metadata="PKG-INFO")
    assert sorted(plugin.name for plugin in found(tmp_path)) == ["a", "b", "c"]
    assert len(entrypoints.get_group_all(GROUP, path=[str(tmp_path)])) == 1  # the trap


def test_a_distribution_hides_its_namesake_further_along_the_path(tmp_path):
    install(tmp_path / "one", "foo_bar-2.0.dist-info", f"[{GROUP}]\nmine = m:New\n", "foo_bar", "2.0")
    install(tmp_path / "two", "Foo.Bar-1.0.dist-info", f"[{GROUP}]\nmine = m:Old\nolder = m:Old\n", "Foo.Bar", "1.0")
    assert [plugin.target for plugin in found([tmp_path / "one", tmp_path / "two"])] == ["m:New"]


def test_a_folder_named_twice_counts_once(tmp_path):
    install(tmp_path, "foo-1.dist-info", f"[{GROUP}]\nmine = m:A\n")
    assert len(found([tmp_path, f"{tmp_path}/", tmp_path / "." / "."])) == 1


def test_what_is_left_of_an_upgrade_counts_once(tmp_path):
    install(tmp_path, "foo-1.0.dist-info", f"[{GROUP}]\nmine = m:A\n", "foo")
    install(tmp_path, "foo-2.0.dist-info", f"[{GROUP}]\nmine = m:A\nnew = m:B\n", "foo", "2.0")
    assert [plugin.target for plugin in found(tmp_path)] == ["m:A", "m:B"]


def test_duplicates_are_all_listed(tmp_path):
    install(tmp_path, "a-1.dist-info", f"[{GROUP}]\nmine = a:A\nmine = a:B\n")
    install(tmp_path, "b-1.dist-info", f"[{GROUP}]\nmine = b:A\n")
    assert [plugin.target for plugin in found(tmp_path)] == ["a:A", "a:B", "b:A"]


def test_names_keep_their_case(tmp_path):
    install(tmp_path, "a-1.dist-info", f"[{GROUP}]\nMine = m:A\nmine = m:B\n")
    assert [plugin.name for plugin in found(tmp_path)] == ["Mine", "mine"]


def test_folders_that_do_not_exist_are_passed_over(tmp_path):
    assert found([tmp_path / "nowhere", ""], "mplus.test_nowhere") == []


@pytest.mark.parametrize(
    ("value", "names"),
    [
        (None, ["a", "b"]),
        ("", []),
        (" , ", []),
        ("pack_A", ["a"]),
        ("Pack.A, pack-b", ["a", "b"]),
        ("pack", []),
    ],
)
def test_environment_limits_discovery(tmp_path, monkeypatch, value, names):
    install(tmp_path, "pack_a-1.dist-info", f"[{GROUP}]\na = m:A\n", "pack-a")
    install(tmp_path, "pack_b-1.dist-info", f"[{GROUP}]\nb = m:B\n", "pack-b")
    if value is None:
        monkeypatch.delenv(plugins.ENVIRONMENT, raising=False)
    else:
        monkeypatch.setenv(plugins.ENVIRONMENT, value)
    assert [plugin.name for plugin in found(tmp_path)] == names


# What importlib.metadata finds is the measure: mplus finds the same or lists it as broken. Only lines without "=" are
# left out, at which importlib.metadata itself stops.
printable = st.characters(codec="utf-8", exclude_categories=("C", "Z"))
key = st.one_of(
    st.sampled_from(["recency", "linear", "A", "a b", "x%y", "k:v", "ünï"]),
    st.text(printable, min_size=1, max_size=8),
).filter(lambda text: "=" not in text and not text.startswith(("#", ";", "[")))
module = st.sampled_from(["m", "package.module", "m2", "a..b", "müdule", ""])
attribute = st.sampled_from(["A", "A.B", "", " B", "B ", "%(x)s", "1"])
value = st.one_of(
    st.builds("{}:{}".format, module, attribute),
    st.builds("{}:{} [{}]".format, module, attribute, st.sampled_from(["x", "x, y", ""])),
    module,
    st.text(st.one_of(printable, st.just(" ")), max_size=12),
)
section = st.sampled_from([GROUP, "mplus.stores", "DEFAULT", "console_scripts"])
distribution_name = st.sampled_from(["foo", "foo-bar", "foo_baz", "Foo.Qux", "other", "foo-bar-2"])
sections = st.lists(st.tuples(section, st.lists(st.tuples(key, value), max_size=3)), max_size=4)
sites = st.lists(
    st.dictionaries(distribution_name, st.tuples(st.sampled_from(["dist-info", "egg-info"]), sections), max_size=4),
    min_size=1,
    max_size=3,
)


def write_site(site, distributions):
    for name, (suffix, groups) in distributions.items():
        stem = name if suffix == "egg-info" else name.replace("-", "_").replace(".", "_")
        text = "".join(
            f"[{group}]\n" + "".join(f"{name} = {value}\n" for name, value in lines) for group, lines in groups
        )
        install(
            site,
            f"{stem}-1.0.{suffix}",
            text.encode(),
            name,
            metadata={"dist-info": "METADATA"}.get(suffix, "PKG-INFO"),
        )


@given(sites)
@example([{"foo": ("dist-info", [(GROUP, [("bad", "100%"), ("good", "m:A")])]), "other": ("dist-info", [(GROUP, [])])}])
@example([{"foo": ("dist-info", [(GROUP, [("a", "m: A")])]), "foo-bar": ("egg-info", [(GROUP, [("b", "m:B")])])}])
def test_what_importlib_metadata_finds_is_found_or_listed_as_broken(generated):
    folders = [tempfile.mkdtemp() for _ in generated]
    try:
        for folder, distributions in zip(folders, generated, strict=True):
            write_site(folder, distributions)
        theirs = {
            (plugins.normalize(distribution.metadata["Name"]), point.name, point.value)
            for distribution in first_of_each_name(folders)
            for point in distribution.entry_points
            if point.group == GROUP
        }
        ours = found(folders)
        names = {(plugins.normalize(plugin.distribution), plugin.name) for plugin in ours}
        assert names == {(distribution, name) for distribution, name, _ in theirs}
        for distribution, name, value in theirs:
            [*same] = [
                plugin
                for plugin in ours
                if (plugins.normalize(plugin.distribution), plugin.name) == (distribution, name)
                and (plugin.error or plugin.target == target_of(value))
            ]
            assert same, f"{name} = {value} of {distribution} is lost"
    finally:
        for folder in folders:
            shutil.rmtree(folder)


def first_of_each_name(folders):
    """The distributions of ``folders``; the first folder that has a name wins, as when importing."""
    seen = {}
    for folder in folders:
        here = {}
        for distribution in importlib.metadata.distributions(path=[folder]):
            here.setdefault(plugins.normalize(distribution.metadata["Name"]), distribution)
        for name, distribution in here.items():
            seen.setdefault(name, distribution)
    return seen.values()


def target_of(value):
    """``module:attribute`` as importlib.metadata understands a value, None where it does not."""
    match = importlib.metadata.EntryPoint.pattern.match(value)
    if match is None:
        return None
    return match["module"] + (f":{match['attr']}" if match["attr"] else "")
