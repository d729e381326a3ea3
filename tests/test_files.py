"""Files appear under their name only after they are completely written."""

import pytest

from rfa_mmdet.errors import UserError
from rfa_mmdet.files import written_whole


def test_file_appears_only_at_the_end(tmp_path):
    path = tmp_path / "new" / "a.csv"
    with written_whole(path) as part:
        part.write_text("some")
        assert not path.exists()
        assert part.suffix == ".csv"
    assert path.read_text() == "some"
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("stop", [ZeroDivisionError, KeyboardInterrupt])
def test_interrupted_write_keeps_the_old_file(tmp_path, stop):
    path = tmp_path / "a.txt"
    path.write_text("old")

    def write():
        with written_whole(path) as part:
            part.write_text("half")
            raise stop

    with pytest.raises(stop):
        write()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", ["é" * 125 + ".jpg", "a" * 255, "a." + "b" * 253])
def test_names_of_maximum_length(tmp_path, name):
    with written_whole(tmp_path / name) as part:
        part.write_text("whole")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_unwritable_paths(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="is a folder"), written_whole(tmp_path):
        pass
    with pytest.raises(UserError, match="cannot be written"), written_whole(tmp_path / "file/a"):
        pass
