"""Folders as the hub and `datasets` lay them out."""

import json

import datasets
import pytest

from irtune.config import DataConfig
from irtune.data import read_corpus
from irtune.errors import DataError

pytestmark = pytest.mark.quick


def rows(count, name="a"):
    return [{"before": f"{name}{i}", "after": f"b{i}", "label": "xyz"[i % 3]} for i in range(count)]


def part(count, name="a"):
    return datasets.Dataset.from_list(rows(count, name))


def shards(folder, stem, count, number, name="a"):
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(number):
        part(count, name).shard(number, index).to_parquet(folder / f"{stem}-{index:05}-of-{number:05}.parquet")


def lines(file, count, name="a"):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows(count, name)))


def sizes(folder, **options):
    corpus = read_corpus(DataConfig(path=str(folder), **options))
    for split, examples in corpus.splits.items():
        ids = [example.id for example in examples]
        assert len(set(ids)) == len(ids)
        assert sorted(e.after for e in examples) == sorted(f"b{i}" for i in range(len(examples))), split
    return {split: len(examples) for split, examples in corpus.splits.items()}


@pytest.mark.parametrize("inner", ["data", "."])
def test_shards_of_the_hub(tmp_path, inner):
    shards(tmp_path / inner, "train", 31, 3)
    shards(tmp_path / inner, "validation", 7, 1)
    shards(tmp_path / inner, "test", 5, 2)
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\nA corpus.\n")
    assert sizes(tmp_path) == {"train": 31, "dev": 7, "test": 5}


def test_a_snapshot_in_the_cache_of_the_hub_client(tmp_path):
    """Its files are links into a folder beside it; links to any other place are refused as ever."""
    kept = tmp_path / "datasets--someone--corpus"
    shards(kept / "blobs", "train", 9, 1)
    shards(kept / "blobs", "validation", 3, 1)
    data = kept / "snapshots/abc123/data"
    data.mkdir(parents=True)
    for number, file in enumerate(sorted((kept / "blobs").iterdir())):
        blob = file.rename(kept / f"blobs/{number:040x}")
        (data / file.name).symlink_to(f"../../../blobs/{blob.name}")
    assert sizes(kept / "snapshots/abc123") == {"train": 9, "dev": 3}
    lines(tmp_path / "secret.jsonl", 3)
    (data / "test-00000-of-00001.jsonl").symlink_to(tmp_path / "secret.jsonl")
    with pytest.raises(DataError, match="leads out of its folder"):
        read_corpus(DataConfig(path=str(kept / "snapshots/abc123")))


def test_a_folder_for_each_split(tmp_path):
    lines(tmp_path / "train/0000.jsonl", 9)
    lines(tmp_path / "val/part.jsonl", 4)
    assert sizes(tmp_path) == {"train": 9, "dev": 4}


def test_what_save_to_disk_writes(tmp_path):
    whole = datasets.DatasetDict({"train": part(20), "validation": part(6), "unsupervised": part(3)})
    whole.save_to_disk(tmp_path / "many", num_shards={"train": 4, "validation": 1, "unsupervised": 1})
    assert sizes(tmp_path / "many") == {"train": 20, "dev": 6}
    part(30).save_to_disk(tmp_path / "one")
    corpus = read_corpus(DataConfig(path=str(tmp_path / "one"), dev_fraction=0.2))
    assert {split: len(examples) for split, examples in corpus.splits.items()} == {"train": 24, "dev": 6}
    part(30).filter(lambda row: row["label"] != "x").save_to_disk(tmp_path / "indices")  # flattened by datasets
    assert len(read_corpus(DataConfig(path=str(tmp_path / "indices"), dev_fraction=0.5)).splits["train"]) == 10


def test_several_configurations(tmp_path):
    for name, count in (("formal", 12), ("casual", 9)):
        shards(tmp_path / name, "train", count, 2, name)
        shards(tmp_path / name, "validation", 3, 1, name)
    with pytest.raises(DataError, match=r"several configurations; set data.config to one of casual, formal"):
        read_corpus(DataConfig(path=str(tmp_path)))
    with pytest.raises(DataError, match=r"no configuration 'formel' \(data.config\); accepted: casual, formal"):
        read_corpus(DataConfig(path=str(tmp_path), config="formel"))
    assert sizes(tmp_path, config="formal") == {"train": 12, "dev": 3}
    corpus = read_corpus(DataConfig(path=str(tmp_path), config="casual"))
    assert corpus.splits["train"][0].before == "casual0" and len(corpus.splits["train"]) == 9


def test_a_single_configuration_needs_no_name(tmp_path):
    shards(tmp_path / "plain_text", "train", 12, 1)
    shards(tmp_path / "plain_text", "test", 4, 1)
    assert sizes(tmp_path / ".", dev=str(tmp_path / "plain_text/test-00000-of-00001.parquet")) == {
        "train": 12, "dev": 4, "test": 4,
    }  # fmt: skip


def test_configurations_as_the_readme_lists_them(tmp_path):
    lines(tmp_path / "raw/a_train.jsonl", 8)
    lines(tmp_path / "raw/a_eval.jsonl", 2)
    lines(tmp_path / "raw/b.jsonl", 5)
    head = """---
configs:
- config_name: a
  data_files:
  - split: train
    path: raw/a_train*
  - split: validation
    path: [raw/a_eval.jsonl]
- config_name: b
  data_files: raw/b.jsonl
---
"""
    (tmp_path / "README.md").write_text(head)
    with pytest.raises(DataError, match=r"set data\.config to one of a, b"):
        read_corpus(DataConfig(path=str(tmp_path)))
    assert sizes(tmp_path, config="a") == {"train": 8, "dev": 2}
    corpus = read_corpus(DataConfig(path=str(tmp_path), config="b", dev_fraction=0.4))
    assert (len(corpus.splits["train"]), len(corpus.splits["dev"])) == (3, 2)
    (tmp_path / "README.md").write_text(head.replace("raw/b.jsonl", "../b.jsonl"))
    lines(tmp_path.parent / "b.jsonl", 5)
    with pytest.raises(DataError, match="leads out of its folder"):
        read_corpus(DataConfig(path=str(tmp_path), config="b", dev_fraction=0.4))
    (tmp_path / "README.md").write_text(head.replace("raw/b.jsonl", "raw/c*"))
    with pytest.raises(DataError, match=r"configuration 'b': no file in the folder matches 'raw/c\*'"):
        read_corpus(DataConfig(path=str(tmp_path), config="b"))


def test_a_configuration_where_there_is_none(tmp_path):
    lines(tmp_path / "train.jsonl", 6)
    with pytest.raises(DataError, match=r"no configuration 'a' \(data.config\); it has none; leave data.config out"):
        read_corpus(DataConfig(path=str(tmp_path), config="a", dev_fraction=0.4))


def test_a_shard_that_is_missing_is_named(tmp_path):
    shards(tmp_path / "data", "train", 30, 3)
    shards(tmp_path / "data", "validation", 3, 1)
    (tmp_path / "data/train-00001-of-00003.parquet").unlink()
    with pytest.raises(DataError, match=r"2 of 3 shards train-\*-of-00003 are there; number 1 is missing"):
        read_corpus(DataConfig(path=str(tmp_path)))


def test_shards_of_several_folders_are_counted_in_each(tmp_path):
    for name, number in (("en", 2), ("de", 3)):
        shards(tmp_path / name, "train", 12, number, name)
    head = "---\nconfigs:\n- config_name: all\n  data_files: [en/*, de/*]\n---\n"
    (tmp_path / "README.md").write_text(head)
    corpus = read_corpus(DataConfig(path=str(tmp_path), config="all", dev_fraction=0.25))
    assert (len(corpus.splits["train"]), len(corpus.splits["dev"])) == (18, 6)
    (tmp_path / "de/train-00002-of-00003.parquet").unlink()
    with pytest.raises(DataError, match=r"de: 2 of 3 shards train-\*-of-00003 are there; number 2 is missing"):
        read_corpus(DataConfig(path=str(tmp_path), config="all", dev_fraction=0.25))


def test_several_files_without_rows_are_named(tmp_path):
    for name in ("train/0.jsonl", "train/1.jsonl"):
        lines(tmp_path / name, 0)
    with pytest.raises(DataError, match=r"/train has no rows$"):
        read_corpus(DataConfig(path=str(tmp_path), dev_fraction=0.5))


def test_two_sources_of_one_split_are_an_error(tmp_path):
    shards(tmp_path / "data", "train", 6, 2)
    lines(tmp_path / "data/train.jsonl", 3)
    with pytest.raises(DataError, match="more than one train file: "):
        read_corpus(DataConfig(path=str(tmp_path)))


@pytest.mark.parametrize("name", ["../train/data.arrow", "/etc/passwd"])
def test_a_saved_folder_reads_no_file_outside_of_it(tmp_path, name):
    part(6).save_to_disk(tmp_path / "corpus")
    (tmp_path / "corpus/state.json").write_text(json.dumps({"_data_files": [{"filename": name}]}))
    with pytest.raises(DataError, match="leads out of its folder"):
        read_corpus(DataConfig(path=str(tmp_path / "corpus"), dev_fraction=0.5))


@pytest.mark.parametrize("note", ["{", "[]", "{}", '{"_data_files": [1]}'])
def test_a_damaged_note_of_a_saved_folder_is_named(tmp_path, note):
    part(6).save_to_disk(tmp_path / "corpus")
    (tmp_path / "corpus/state.json").write_text(note)
    with pytest.raises(DataError, match=r"state.json"):
        read_corpus(DataConfig(path=str(tmp_path / "corpus"), dev_fraction=0.5))


def test_errors_in_a_shard_name_its_file_and_row(tmp_path):
    lines(tmp_path / "train/0.jsonl", 3)
    bad = [{"before": before, "after": "b", "label": "x"} for before in ("a", 1)]
    (tmp_path / "train/1.jsonl").write_text("".join(json.dumps(row) + "\n" for row in bad))
    with pytest.raises(DataError, match=r"train/1.jsonl, row 2, column 'before': expected text, not the int 1"):
        read_corpus(DataConfig(path=str(tmp_path), dev_fraction=0.5))


def test_a_configuration_of_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, config=None):
        asked.append(config)
        if config not in ("en", "de"):
            missing = "Config name is missing.\nPlease pick one among the available configs: ['en', 'de']"
            unknown = f"BuilderConfig '{config}' not found. Available: ['en', 'de']"
            raise ValueError(missing if config is None else unknown)
        return {"train": part(6), "validation": part(3)}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read_corpus(DataConfig(path="someone/corpus", config="de")).splits["train"]) == 6
    with pytest.raises(DataError, match=r"several configurations; set data\.config to one of 'en', 'de'"):
        read_corpus(DataConfig(path="someone/corpus"))
    with pytest.raises(DataError, match=r"no configuration 'fr'; set data\.config to one of 'en', 'de'"):
        read_corpus(DataConfig(path="someone/corpus", config="fr"))
    assert asked == ["de", None, "fr"]
