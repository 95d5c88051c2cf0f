"""Configuration files: which are read, how they add up, and what is said of those that cannot be read."""

from __future__ import annotations

import pytest

from llmuxd.config import ConfigError, load_config


@pytest.fixture
def write(tmp_path):
    """Write a file below the test's folder; gives its path."""

    def write_file(name, content):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return path

    return write_file


def said(path):
    """The problems of a file, without the folder's name."""
    with pytest.raises(ConfigError) as caught:
        load_config(path, {})
    return str(caught.value).replace(f"{path.parent}/", "").splitlines()


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("f.toml", "port = 1\nlisten = = 3", "f.toml: is not TOML: Invalid value (at line 2, column 10)"),
        ("f.toml", "port = 1\nlisten =", "f.toml: is not TOML: Invalid value (at the end, line 2, column 9)"),
        ("f.toml", "port = 1\nport = 2\n", "f.toml: is not TOML: Cannot overwrite a value (at line 2, column 9)"),
        ("f.toml", '{"port": 3}', "f.toml: is not TOML: Invalid statement (at line 1, column 1); if it is JSON, let its name end in .json"),
        ("llmux", '\n{\n"port": 3}', "llmux: is not TOML: Invalid statement (at line 2, column 1); if it is JSON, let its name end in .json"),
        ("f.json", '{\n "port": 1,\n}', "f.json: is not JSON: "),
        ("f.json", "{]", "f.json: is not JSON: Expecting property name enclosed in double quotes: line 1 column 2 (char 1)"),
        ("f.json", "port = 3\n", "f.json: is not JSON: Expecting value: line 1 column 1 (char 0); if it is TOML, name it .toml"),
        ("f.JSON", "{]", "f.JSON: is not JSON: "),
        ("f.json", "[1]", "f.json: found [1]; allowed: an object"),
        ("f.json", '{"models": {"a": {"port": 1, "port": 2}}}', 'f.json: is not JSON: the key "port" is there twice in one object'),
        ("f.json", "[" * 100_000, "f.json: is nested too deeply"),
        ("f.toml", b"# \xc3\xa4\n# \xff\n", "f.toml: is not UTF-8 (line 2)"),
    ],
)  # fmt: skip
def test_files_that_cannot_be_parsed(write, name, content, expected):
    (problem,) = said(write(name, content))
    assert problem.startswith(expected)


def test_a_file_that_is_not_there(tmp_path):
    assert said(tmp_path / "none.toml") == ["none.toml: cannot be read: No such file or directory"]


def test_a_folder_is_not_a_file(tmp_path):
    (tmp_path / "f.toml").mkdir()
    assert said(tmp_path / "f.toml") == ["f.toml: cannot be read: Is a directory"]


def test_a_link_to_itself_cannot_be_read(tmp_path):
    (tmp_path / "f.toml").symlink_to("f.toml")
    assert said(tmp_path / "f.toml") == ["f.toml: cannot be read: Too many levels of symbolic links"]


def test_an_editors_byte_order_mark_is_no_error(write):
    assert load_config(write("f.toml", b"\xef\xbb\xbfport = 1\n"), {}).port == 1
    assert load_config(write("f.json", b'\xef\xbb\xbf{"port": 2}'), {}).port == 2


def test_a_name_without_a_folder(write, tmp_path, monkeypatch):
    write("f.toml", "port = 1\n")
    write("conf.d/a.toml", 'models.a.model_path = "p"\n')
    monkeypatch.chdir(tmp_path)
    assert list(load_config("f.toml", {}).models) == ["a"]


class TestConfD:
    def test_its_files_add_up_in_the_order_of_their_names(self, write):
        file = write("llmux.toml", 'port = 1\n[models.m]\nmodel_path = "p"\n')
        write("conf.d/20.toml", '[models.b]\nmodel_path = "p"\n')
        write("conf.d/10.toml", '[models.c]\nmodel_path = "p"\n[policy]\nmin_active_secs = 2\n')
        write("conf.d/30.toml", "[policy]\nmax_wait_secs = 3\n")
        config = load_config(file, {})
        assert list(config.models) == ["m", "c", "b"]
        assert (config.port, config.policy.min_active_secs, config.policy.max_wait_secs) == (1, 2, 3)

    def test_it_is_read_beside_json_too(self, write):
        file = write("config.json", '{"port": 1}')
        write("conf.d/a.toml", 'models.a.model_path = "p"\n')
        assert list(load_config(file, {}).models) == ["a"]

    def test_keys_add_up_and_each_file_counts_its_own(self, write):
        def key(name, digit, more=""):
            return f'[[keys]]\nname = "{name}"\nsha256 = "{digit * 64}"\n{more}'

        file = write("llmux.toml", key("alice", "a") + key("bob", "b"))
        write("conf.d/10.toml", key("carol", "c"))
        assert [one.name for one in load_config(file, {}).keys] == ["alice", "bob", "carol"]
        write("conf.d/20.toml", key("alice", "d") + key("dora", "d") + key("eve", "b", "max_paralel = 1\n"))
        write("conf.d/30.toml", '[[keys]]\nname = "frank"\n')
        assert said(file) == [
            "conf.d/20.toml: keys[2].max_paralel: unknown key; did you mean 'max_parallel'?",
            "conf.d/30.toml: keys[0].sha256: is missing; allowed: the SHA-256 of a key, 64 hexadecimal digits; "
            "`llmuxctl key new NAME` makes both",
            'conf.d/20.toml: keys[0].name: found "alice", which keys[0] of llmux.toml has already',
            'conf.d/20.toml: keys[1].sha256: found "***", which keys[0] has already',
            'conf.d/20.toml: keys[2].sha256: found "***", which keys[1] of llmux.toml has already',
        ]

    def test_one_table_may_be_spread_over_files(self, write):
        file = write("llmux.toml", "[models.a]\nport = 8001\n")
        write("conf.d/a.toml", '[models.a]\nmodel_path = "p"\n')
        model = load_config(file, {}).models["a"]
        assert (model.model_path, model.port) == ("p", 8001)

    def test_what_is_missing_is_said_once_of_the_first_file(self, write):
        file = write("llmux.toml", "[models.a]\nport = 8001\n")
        write("conf.d/a.toml", '[models.a]\neviction = "retain+stop"\n')
        (problem,) = said(file)
        assert problem.startswith("llmux.toml: models.a.model_path: is missing; ")

    def test_a_key_that_is_set_twice_names_both_files(self, write):
        file = write("llmux.toml", 'port = 1\n[models.a]\nmodel_path = "p"\n')
        write("conf.d/a.toml", 'port = 1\n[models.a]\nmodel_path = "q"\n')
        assert said(file) == [
            "conf.d/a.toml: port: is set in llmux.toml already",
            "conf.d/a.toml: models.a.model_path: is set in llmux.toml already",
        ]

    def test_problems_are_in_the_file_that_has_them(self, write):
        file = write("llmux.toml", '[models.a]\nmodel_path = "p"\nport = 8001\n')
        write("conf.d/a.toml", '[models.b]\nmodel_path = "p"\nport = 8001\naliases = ["a"]\n')
        assert said(file) == [
            'conf.d/a.toml: models.b.aliases: found "a", which is the name of a model already',
            "conf.d/a.toml: models.b.port: found 8001, which models.a.port has already",
        ]

    def test_every_file_that_cannot_be_read_is_named_and_the_rest_is_checked(self, write):
        file = write("llmux.toml", "port = =\n")
        write("conf.d/a.toml", b"\xff")
        write("conf.d/b.toml", "[models.a]\nport = 0\n")
        problems = said(file)
        assert [problem.partition(":")[0] for problem in problems] == ["llmux.toml", "conf.d/a.toml", "conf.d/b.toml"]
        assert problems[2] == "conf.d/b.toml: models.a.port: found 0; allowed: a port, 1 to 65535"

    def test_other_and_hidden_files_are_left_alone(self, write, tmp_path):
        file = write("llmux.toml", "")
        write("conf.d/README", "nonsense")
        write("conf.d/a.toml.bak", "nonsense")
        # An editor's lock on a.toml points nowhere.
        (tmp_path / "conf.d" / ".#a.toml").symlink_to("user@host.1")
        assert load_config(file, {}).models == {}

    def test_a_file_of_that_name_is_not_a_folder(self, write):
        file = write("llmux.toml", "")
        write("conf.d", "nonsense")
        assert load_config(file, {}).models == {}

    def test_a_folder_that_cannot_be_read_is_an_error(self, write, tmp_path):
        file = write("llmux.toml", "")
        (tmp_path / "conf.d").symlink_to("conf.d")
        assert said(file) == ["conf.d: cannot be read: Too many levels of symbolic links"]
