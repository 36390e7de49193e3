"""Files are complete or not there; errors of other libraries become one line."""

import hashlib
import json

import pytest

from irtune.errors import OutputError, one_line
from irtune.files import fingerprint, replacing, to_json, write_json, write_text, writing

pytestmark = pytest.mark.quick


def test_a_file_is_complete_or_as_before(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"ä": [1]})
    assert file.read_text(encoding="utf-8") == '{\n  "ä": [\n    1\n  ]\n}\n'
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    with pytest.raises(UnicodeEncodeError), replacing(file) as scratch:
        scratch.write_text("half" * 2**20 + "\ud800")
    assert scratch.suffix == ".json"  # by which libraries tell formats
    assert json.loads(file.read_text(encoding="utf-8")) == {"ä": [1]}
    write_text(file, "x\r\ny\n")
    assert file.read_bytes() == b"x\r\ny\n"  # nothing is translated
    assert list(tmp_path.iterdir()) == [file]


def test_half_a_surrogate_pair_is_escaped():
    assert to_json({"a": ["ä\ud800", float("nan")]}) == '{"a": ["\\u00e4\\ud800", null]}'
    assert to_json({"a": "ä😀"}) == '{"a": "ä😀"}'


def test_a_folder_is_complete_or_not_there(tmp_path):
    target = tmp_path / "export"
    (tmp_path / ".export").mkdir()
    (tmp_path / ".export" / "old").touch()  # left by a process that was killed

    def half():
        with writing(target), replacing(target) as scratch:
            scratch.mkdir()
            (scratch / "half").touch()
            (scratch / "no" / "folder").touch()

    with pytest.raises(OutputError, match="export: No such file"):
        half()
    assert list(tmp_path.iterdir()) == []
    with replacing(target) as scratch:
        scratch.mkdir()
        (scratch / "whole").touch()
    assert [file.name for file in target.iterdir()] == ["whole"] and list(tmp_path.iterdir()) == [target]


def test_a_file_that_cannot_be_replaced_is_one_sentence(tmp_path):
    with pytest.raises(OutputError, match="a/b: No such file or directory"), writing(tmp_path / "a/b"):
        write_text(tmp_path / "a/b", "x")


def test_fingerprint(tmp_path):
    file = tmp_path / "large"
    file.write_bytes(b"ab" * 2**20)
    assert fingerprint(file) == {"bytes": 2**21, "sha256": hashlib.sha256(b"ab" * 2**20).hexdigest()}


def test_an_error_is_one_line_without_secrets():
    error = ValueError("a\n  b\tc https://me:hidden@host/ " + "x" * 999)
    assert one_line(error).startswith("a b c https://me:***@host/ xxx") and len(one_line(error)) == 1003
    assert one_line(ValueError("First. Second, longer."), 10) == "First."
