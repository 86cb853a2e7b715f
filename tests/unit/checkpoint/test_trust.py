"""What a downloaded checkpoint may not do: lead out of its folder, claim what its files lack, be read twice over."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save, save_file

from llmcompress.checkpoint.pickle import converted
from llmcompress.checkpoint.reader import Checkpoint
from llmcompress.checkpoint.safetensors import read_header
from llmcompress.checkpoint.source import load_tokenizer, side_files, source_metadata
from llmcompress.errors import LLMCompressError
from tests import tiny_models

SECRET = "what nobody may read"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tiny_models.save(tmp_path / "model", tiny_models.configs()["llama"])


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    return tiny_models.save(tmp_path / "sharded", tiny_models.configs()["llama"], max_shard_size="100KB")


def refused(path: Path, **options: bool) -> str:
    with pytest.raises(LLMCompressError) as caught:
        Checkpoint.open(path, **options)
    return caught.value.message


# --- links and names ---


@pytest.mark.parametrize("name", ["merges.txt", "config.json", "model.safetensors", "chat_template.jinja"])
def test_a_link_out_of_the_folder_is_refused_by_name(name: str, folder: Path, tmp_path: Path) -> None:
    key = tmp_path / "id_ed25519"
    key.write_text(SECRET)
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(key)
    assert f"{name}: is a link out of the checkpoint's folder" in refused(folder)
    with pytest.raises(LLMCompressError, match="is a link out"):
        side_files(folder)
        Checkpoint.open(folder)


def test_a_link_to_nothing_is_found_before_any_work(folder: Path) -> None:
    (folder / "vocab.json").symlink_to(folder / "gone.json")
    assert "vocab.json: is a link to nothing" in refused(folder)
    (folder / "vocab.json").unlink()
    (folder / "vocab.json").symlink_to(folder / "vocab.json")
    assert "vocab.json: cannot be followed" in refused(folder)


def test_links_inside_the_folder_and_into_a_snapshots_blobs_are_followed(folder: Path, tmp_path: Path) -> None:
    identity = Checkpoint.open(folder).identity()
    snapshot = tmp_path / "models--org--name" / "snapshots" / "0123"
    blobs = tmp_path / "models--org--name" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in folder.iterdir():
        path.rename(blobs / f"hash-{path.name}")
        (snapshot / path.name).symlink_to(Path("../../blobs") / f"hash-{path.name}")
    (snapshot / "again.json").symlink_to(snapshot / "config.json")
    assert Checkpoint.open(snapshot).identity() == identity
    outside = tmp_path / "models--org--name" / "refs"
    outside.write_text(SECRET)
    (snapshot / "vocab.json").symlink_to(outside)
    assert "vocab.json: is a link out" in refused(snapshot)


def test_blobs_that_are_a_link_themselves_are_no_way_out(folder: Path, tmp_path: Path) -> None:
    snapshot = tmp_path / "models--x" / "snapshots" / "0123"
    snapshot.parent.mkdir(parents=True)
    folder.rename(snapshot)
    private = tmp_path / "private"
    private.mkdir()
    (private / "key").write_text(SECRET)
    (tmp_path / "models--x" / "blobs").symlink_to(private)
    (snapshot / "vocab.json").symlink_to(Path("../../blobs/key"))
    assert "vocab.json: is a link out" in refused(snapshot)


@pytest.mark.parametrize("kind", ["up", "absolute", "linked folder", "long"])
@pytest.mark.parametrize("pickled", [False, True])
def test_an_index_reads_no_other_model(kind: str, pickled: bool, sharded: Path, tmp_path: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    name = content["weight_map"]["model.norm.weight"]
    other = tmp_path / "other"
    other.mkdir()
    (sharded / name).rename(other / name)
    names = {"up": f"../other/{name}", "absolute": str(other / name), "linked folder": f"in/{name}", "long": "x" * 300}
    if kind == "linked folder":
        (sharded / "sub").mkdir()
        (sharded / "sub" / "in").symlink_to(other)
        names[kind] = f"sub/in/{name}"
    content["weight_map"] = {
        tensor: names[kind] if file == name else file for tensor, file in content["weight_map"].items()
    }
    index.write_text(json.dumps(content))
    if pickled:
        index.rename(sharded / "pytorch_model.bin.index.json")
    message = refused(sharded, allow_pickle=True)
    assert "lies inside its folder" in message or "is a link out" in message


# --- which file is read ---


def test_one_file_is_read_before_an_index_as_transformers_does(folder: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    old = tiny_models.save(tmp_path / "old", tiny_models.configs()["llama"], seed=7, max_shard_size="100KB")
    for path in old.glob("model*"):
        path.rename(folder / path.name)
    checkpoint = Checkpoint.open(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(checkpoint.tensor(name), theirs[name])
    (note,) = checkpoint.notes
    assert "model.safetensors.index.json: not read, since model.safetensors is there" in note


def test_an_index_whose_shards_are_gone_is_left_aside(folder: Path) -> None:
    index = {"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert Checkpoint.open(folder).notes


# --- headers ---

VALID = {"a": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}


def header(path: Path, text: str | bytes, data: bytes = b"\0" * 16, length: int | None = None) -> str:
    raw = text.encode() if isinstance(text, str) else text
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    with pytest.raises(LLMCompressError) as caught:
        read_header(path)
    assert caught.value.message.startswith(str(path)) and "\n" not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"shape": [2.0, 2]}, "integers from 0 up"),
        ({"shape": [True, 4]}, "integers from 0 up"),
        ({"shape": [-2, -2]}, "integers from 0 up"),
        ({"shape": "22"}, "integers from 0 up"),
        ({"shape": [1] * 65 + [4]}, "list of up to 64"),
        ({"shape": [2**62, 2**62]}, "not those of F32"),
        ({"dtype": "Q4"}, "dtype Q4, which is not supported"),
        ({"dtype": ["F32"]}, "which is not supported"),
        ({"data_offsets": [0, 16, 16]}, "[begin, end]"),
        ({"data_offsets": [16, 0]}, "begin <= end"),
        ({"data_offsets": [0.0, 16.0]}, "[begin, end]"),
        ({"data_offsets": [4, 20]}, "begins after bytes that belong to none"),
        ({"extra": 1}, "nothing else"),
    ],
)
def test_a_header_is_a_claim_that_is_checked(change: dict[str, object], expected: str, tmp_path: Path) -> None:
    assert expected in header(tmp_path / "x.safetensors", json.dumps({"a": VALID["a"] | change}))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"a": 1}', "must have dtype"),
        ("[]", "holds a list"),
        ("{", "not valid JSON"),
        ('{"a": {}, "a": {}}', "gives a twice"),
        ('{"__metadata__": {"format": 1}}', "must map names to text"),
        ("[" * 100_000, "nested too deeply"),
        (b'{"\xff": 1}', "not valid JSON"),
        ('{"\\ud800": {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}}', "not valid JSON"),
        ('{"a": ' + "9" * 5000 + "}", "not valid JSON"),
    ],
)
def test_a_header_that_is_no_header(text: str | bytes, expected: str, tmp_path: Path) -> None:
    assert expected in header(tmp_path / "x.safetensors", text)


def test_bytes_belong_to_one_tensor_each(tmp_path: Path) -> None:
    entries = {"a": VALID["a"], "b": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}
    assert "tensor b begins inside another tensor's bytes" in header(tmp_path / "x.safetensors", json.dumps(entries))
    assert "longer than its header says" in header(tmp_path / "x.safetensors", json.dumps(VALID), b"\0" * 17)
    assert "truncated" in header(tmp_path / "x.safetensors", json.dumps(VALID), b"\0" * 15)
    assert "truncated or not a safetensors file" in header(tmp_path / "x.safetensors", "{}", length=2**63)


def test_a_header_is_not_read_into_memory_whatever_it_claims(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    with path.open("wb") as file:
        file.write((1 << 30).to_bytes(8, "little"))
        file.truncate(2 << 30)  # sparse
    with pytest.raises(LLMCompressError, match="its header would be 1073741824 bytes"):
        read_header(path)


def test_tensors_without_values_are_read(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(save({"a": torch.zeros(0, 3), "b": torch.ones(2)}))
    assert {name: tensor.shape for name, tensor in read_header(tmp_path / "x.safetensors").items()} == {
        "a": (0, 3),
        "b": (2,),
    }


# --- configs ---


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"num_hidden_layers": 10**9}, "num_hidden_layers is 1000000000; the files hold 21 tensors"),
        ({"num_hidden_layers": 2.5}, "must be an integer from 0 up"),
        ({"num_attention_heads": 0}, "must be an integer from 1 up"),
        ({"vocab_size": 10**12}, "the files hold"),
        ({"num_local_experts": 10**8}, "the files hold 21 tensors"),
        ({"model_type": ["llama"]}, "model_type is ['llama']; must be a string"),
        ({"architectures": [3]}, "must be a list of class names"),
        ({"quantization_config": "gptq"}, "must be an object"),
        ({"tie_word_embeddings": "yes"}, "must be true or false"),
        ({"text_config": {"num_hidden_layers": 10**9}}, "text_config.num_hidden_layers"),
    ],
)
def test_a_config_is_held_against_the_files(change: dict[str, object], expected: str, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text()) | change
    (folder / "config.json").write_text(json.dumps(config))
    message = refused(folder)
    assert message.startswith(str(folder / "config.json")) and expected in message


def test_an_index_of_another_shape(sharded: Path) -> None:
    index = sharded / "model.safetensors.index.json"
    for content in ({}, {"weight_map": []}, {"weight_map": {"a": 3}}, {"weight_map": {"a": None}}):
        index.write_text(json.dumps(content))
        assert "weight_map" in refused(sharded)
    index.write_text('{"weight_map": {"a": "x", "a": "y"}}')
    assert "gives a twice" in refused(sharded)


# --- pickles ---


@pytest.fixture
def pickled(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLMCOMPRESS_CACHE", str(tmp_path / "cache"))
    state = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(state | {"empty": torch.zeros(0), "empty too": torch.zeros(0)}, folder / "pytorch_model.bin")
    return folder


def test_what_pickles_become_lies_where_only_this_user_can_write(pickled: Path, tmp_path: Path) -> None:
    path = converted([pickled / "pytorch_model.bin"])
    assert path.parent == tmp_path / "cache" / "pickle"
    assert path.parent.stat().st_mode & 0o777 == 0o700 and path.stat().st_mode & 0o777 == 0o600
    assert {"empty", "empty too"} <= load_file(path).keys()
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    path.chmod(0o666)
    with pytest.raises(LLMCompressError, match="nobody else may write"):
        converted([pickled / "pytorch_model.bin"])
    path.unlink()
    save_file({"planted": torch.ones(1)}, tmp_path / "planted")
    path.symlink_to(tmp_path / "planted")
    with pytest.raises(LLMCompressError, match="must belong to this user"):
        converted([pickled / "pytorch_model.bin"])


@pytest.mark.skipif(os.getuid() != 0, reason="only root can give a folder away")
def test_a_cache_of_somebody_else_is_refused(pickled: Path, tmp_path: Path) -> None:
    (tmp_path / "cache" / "pickle").mkdir(parents=True)
    os.chown(tmp_path / "cache" / "pickle", 12345, 12345)
    with pytest.raises(LLMCompressError, match="must belong to this user"):
        converted([pickled / "pytorch_model.bin"])


@pytest.mark.parametrize("state", [[1, 2], {"a": 3}, {1: torch.ones(1)}, {"a": torch.eye(2).to_sparse()}])
def test_a_pickle_of_anything_but_tensors(state: object, pickled: Path) -> None:
    torch.save(state, pickled / "pytorch_model.bin")
    with pytest.raises(LLMCompressError, match=r"pytorch_model\.bin: "):
        converted([pickled / "pytorch_model.bin"])


# --- the card and the tokenizer ---


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("---\nlicense:\n- mit\n---\n", {"license": "mit"}),
        ("---\nlicense: [mit]\n---\n", {"license": "mit"}),
        ("---\nlicense: [mit, apache-2.0]\n---\n", {"license": "other", "license_name": "mit, apache-2.0"}),
        ("\ufeff---\nlicense: mit\nlanguage: no\n---\n", {"license": "mit", "languages": ["no"]}),
        ("---\r\nlanguage:\r\n- en\r\n- no\r\n---\r\n", {"languages": ["en", "no"]}),
        ("---\nlicense: mit\nmodel-index: [" + "[" * 500 + "\n---\n", {"license": "mit"}),
        ("---\nlanguage: 3\nlicense: {a: b}\n---\n", {}),
        ("---\nlicense: mit\n", {}),
        ("license: mit\n", {}),
        ("---\nlicense: &a [*a]\n---\n", {}),
        ("---\nlicense: [unclosed\n---\n", {}),
    ],
)
def test_the_front_matter_is_read_as_the_hub_reads_it(text: str, expected: dict[str, object], tmp_path: Path) -> None:
    (tmp_path / "README.md").write_bytes(text.encode())
    found = {key: value for key, value in source_metadata(tmp_path).items() if value}
    assert found == expected


def test_a_tokenizer_that_lacks_a_package_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmcompress.checkpoint.source._installed", lambda module: module != "sentencepiece")
    (folder / "tokenizer.model").write_bytes(b"x")
    with pytest.raises(LLMCompressError, match="sentencepiece cannot be imported") as caught:
        load_tokenizer(Checkpoint.open(folder))
    assert "pip install" in (caught.value.hint or "")
