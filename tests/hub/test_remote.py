"""Files on the Hub read by ranges: every tensor as it is, cut connections taken up again, damage told by name."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save

from fake_hub import FakeHub, Repo
from lox_hf.errors import CheckpointError
from lox_hf.hub_files import Resolved
from lox_hf.records import ModelReference
from lox_hf.weights import ranges, remote
from lox_hf.weights.ranges import RemoteFile
from lox_hf.weights.remote import RemoteSource, open_remote
from lox_hf.weights.source import CheckpointSource
from test_hub import TOKEN

SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
STORE = "/store/"


@dataclass
class Place:
    """A Hub with one model, and its small files on this machine."""

    hub: FakeHub
    folder: Path
    tensors: dict[str, torch.Tensor]

    @property
    def files(self) -> dict[str, bytes]:
        """What the repository holds."""
        return self.hub.repos["org/model"].at("main")[1]

    def file(self, name: str = SHARDS[0]) -> RemoteFile:
        """One of its files."""
        return RemoteFile("org/model", name, self.hub.head("org/model"), TOKEN)

    def source(self) -> RemoteSource:
        """The model."""
        return RemoteSource("org/model", token=TOKEN, work_dir=self.folder)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """A Hub that the client of this process takes for the Hub."""
    rng = torch.Generator().manual_seed(0)
    tensors = {
        "a.weight": torch.randn(700, 300, generator=rng).bfloat16(),
        "b.weight": torch.randn(64, 32, generator=rng),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(7),
        "c.weight": torch.randn(500, 200, generator=rng).half(),
    }
    parts = ({name: tensors[name] for name in list(tensors)[:3]}, {name: tensors[name] for name in list(tensors)[3:]})
    index = {"weight_map": {name: shard for shard, part in zip(SHARDS, parts, strict=True) for name in part}}
    files = {shard: save(part) for shard, part in zip(SHARDS, parts, strict=True)}
    files["model.safetensors.index.json"] = json.dumps(index).encode()
    (tmp_path / "model.safetensors.index.json").write_bytes(files["model.safetensors.index.json"])
    with FakeHub(TOKEN) as hub:
        hub.repos["org/model"] = Repo(private=True)
        sha = hub.repos["org/model"].commit(files)
        found = (Resolved(tmp_path, ModelReference("org/model", sha)), frozenset(files))
        monkeypatch.setattr(remote, "find_repository", lambda *_, **__: found)
        monkeypatch.setattr(
            huggingface_hub, "hf_hub_url", lambda repo, name, revision: f"{hub.url}/{repo}/resolve/{revision}/{name}"
        )
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(ranges, "FIRST_WAIT_S", 0.01)
        monkeypatch.setattr(ranges, "LONGEST_WAIT_S", 0.02)
        yield Place(hub, tmp_path, tensors)


def read(file: RemoteFile, start: int, stop: int) -> bytes:
    """A part of a file."""
    return b"".join(file.pieces(start, stop))


def test_every_tensor_comes_as_it_is(place: Place) -> None:
    source = place.source()
    local = local_copy(place)
    assert source.infos() == local.infos()
    for name, tensor in place.tensors.items():
        source.prefetch(name)
        assert source.get(name).equal(tensor) and source.get(name).shape == tensor.shape
        assert bytes(source.raw(name)) == bytes(local.raw(name))
        source.release(name)
    assert [path.name for path in place.folder.iterdir() if path.is_file()] == ["model.safetensors.index.json"]


def local_copy(place: Place) -> CheckpointSource:
    """The same files in a folder."""
    folder = place.folder / "local"
    folder.mkdir()
    for name, data in place.files.items():
        (folder / name).write_bytes(data)
    return CheckpointSource(folder, "local")


def test_only_the_bytes_that_are_asked_for_are_read(place: Place) -> None:
    source = place.source()
    place.hub.ranges.clear()
    source.get("b.weight")
    entry = source.shards[0].entries["b.weight"]
    assert {wanted for _, wanted in place.hub.ranges} == {f"bytes={entry.start}-{entry.stop - 1}"}
    assert place.hub.ranges[0][0].startswith("/org/model/resolve/" + place.hub.head("org/model"))


def test_a_shard_is_saved_whole_and_equals_the_hubs(place: Place) -> None:
    shard = place.source().shards[0]
    shard.save(place.folder / "copy")
    assert (place.folder / "copy").read_bytes() == place.files[SHARDS[0]]
    assert bytes(shard.header) == place.files[SHARDS[0]][: len(shard.header)]


def test_a_model_in_the_cache_is_read_there(place: Place) -> None:
    for name in SHARDS:
        (place.folder / name).write_bytes(place.files[name])
    _, source = open_remote("org/model", None, TOKEN, label="x", work_dir=place.folder)
    assert isinstance(source, CheckpointSource) and not place.hub.ranges


@pytest.mark.parametrize("cut_after", [0, 1, 70_001])
def test_a_cut_connection_goes_on_from_the_byte_reached(cut_after: int, place: Place) -> None:
    fault = place.hub.fail(STORE, cut_after=cut_after, times=3)
    data = place.files[SHARDS[0]]
    assert read(place.file(), 5, len(data)) == data[5:]
    assert fault.times == 0
    starts = [int(wanted.removeprefix("bytes=").split("-")[0]) for path, wanted in place.hub.ranges if STORE in path]
    assert len(starts) == 4 and starts == sorted(starts) and starts[0] == 5
    assert starts[-1] <= 5 + 3 * cut_after


def test_many_cuts_are_survived_as_long_as_bytes_arrive(place: Place) -> None:
    place.hub.fail(STORE, cut_after=2**16, times=20)
    data = place.files[SHARDS[0]]
    assert read(place.file(), 0, len(data)) == data


def test_a_connection_that_brings_nothing_ends_with_the_files_name(place: Place) -> None:
    place.hub.fail(STORE, cut_after=0, times=100)
    with pytest.raises(CheckpointError, match=rf"Cannot read {SHARDS[0]} of 'org/model' at .*byte 0, and 6 tries"):
        read(place.file(), 0, 100)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_hub_is_asked_again(status: int, place: Place) -> None:
    place.hub.fail("/resolve/", status=status, times=1)
    assert read(place.file(), 0, 8) == place.files[SHARDS[0]][:8]


def test_an_answer_that_is_no_is_told_at_once(place: Place) -> None:
    with pytest.raises(CheckpointError, match=r"'org/model' at revision '.*' has no other.safetensors on the Hub"):
        read(place.file("other.safetensors"), 0, 8)
    with pytest.raises(CheckpointError, match=r"neither a folder on this machine nor a model on the Hub"):
        read(RemoteFile("org/model", SHARDS[0], place.hub.head("org/model"), False), 0, 8)


def test_a_file_that_changes_is_named(place: Place) -> None:
    file = place.file()
    read(file, 0, 8)
    place.files[SHARDS[0]] = save({"a.weight": torch.zeros(3)})
    with pytest.raises(CheckpointError, match=rf"{SHARDS[0]} of 'org/model' at .* changed while it was read"):
        read(file, 0, 8)


def test_content_that_is_not_what_the_hub_says_is_refused(place: Place) -> None:
    file = place.file()
    read(file, 0, 8)
    oid = file.etag
    place.hub.store[oid] = bytes(len(place.hub.store[oid]))
    file._url = f"{place.hub.store_url}/{oid}"  # the store, past the Hub that would put the right content there again
    with pytest.raises(CheckpointError, match=rf"{SHARDS[0]} of 'org/model' at .* arrived with another content"):
        file.save(place.folder / "copy")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"<html>an error page</html>", "truncated or not safetensors"),
        (b"\x10", "truncated or not safetensors"),
        (b"\xff" * 64, "truncated or not safetensors"),
        (b"\x02\x00\x00\x00\x00\x00\x00\x00[]", "truncated or not safetensors"),
    ],
)
def test_files_that_are_no_safetensors_files(content: bytes, match: str, place: Place) -> None:
    place.files[SHARDS[0]] = content
    with pytest.raises(CheckpointError, match=rf"Cannot read {SHARDS[0]} of 'org/model' at .*{match}"):
        place.source()


def test_a_truncated_file_and_a_wrong_index(place: Place) -> None:
    whole = place.files[SHARDS[0]]
    place.files[SHARDS[0]] = whole[:-10]
    with pytest.raises(CheckpointError, match=rf"Cannot read {SHARDS[0]} of 'org/model' at .*truncated"):
        place.source()
    place.files[SHARDS[0]] = save({"b.weight": place.tensors["b.weight"]})
    with pytest.raises(CheckpointError, match="The index of 'org/model' does not match its shards: 2 tensors differ"):
        place.source()


def test_a_full_disk_is_told_in_words(place: Place) -> None:
    source = place.source()
    shutil.rmtree(place.folder)
    with pytest.raises(OSError, match=r"Cannot write .*Nothing was published"):
        source.get("a.weight")


def test_headers_longer_than_the_first_read(place: Place) -> None:
    many = {f"layer.{number:05d}.weight": torch.full((2,), float(number)) for number in range(2000)}
    place.files[SHARDS[0]] = save(many | {name: place.tensors[name] for name in list(place.tensors)[:3]})
    with pytest.raises(CheckpointError, match="2000 tensors differ"):  # it was read whole, and is not in the index
        place.source()


def test_the_local_copy_is_what_safetensors_reads(place: Place) -> None:
    place.source().shards[1].save(place.folder / "copy.safetensors")
    assert load_file(place.folder / "copy.safetensors")["c.weight"].equal(place.tensors["c.weight"])
