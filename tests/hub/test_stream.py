"""From the Hub to the Hub, shard by shard: the bytes of the local route, one commit, little disk, and faults."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load, save

import zoo
from fake_hub import FakeHub, Repo
from lox_hf import LoxConfig, harden_checkpoint
from lox_hf.records import HardeningReport
from test_hub import TOKEN, World

CLIENT = Path(__file__).with_name("streaming_client.py")
REPORT = "lox_report.json"


def client(world: World, *names: str) -> dict[str, Any]:
    """Run functions of the client."""
    done = world.run(CLIENT, world.root, *names)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def files(world: World, name: str) -> dict[str, bytes]:
    """The newest files of a repository."""
    return world.hub.repos[f"org/{name}"].at("main")[1]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A Hub with a pair of differently cut shards; a run from Hub to Hub, and copies of it that were tampered with."""
    root = tmp_path_factory.mktemp("streaming")
    zoo.save_pair("llama", root, max_shard_size="60KB", base_max_shard_size="45KB")
    (root / "work").mkdir()
    with FakeHub(TOKEN) as hub:
        for name in ("aligned", "base"):
            hub.repos[f"org/{name}"] = Repo(private=True)
            hub.repos[f"org/{name}"].commit({path.name: path.read_bytes() for path in (root / name).iterdir()})
        adapter = {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b""}
        hub.repos["org/adapter"] = Repo()
        hub.repos["org/adapter"].commit(adapter)
        hub.repos["org/other"] = Repo()
        hub.repos["org/other"].commit({"model.safetensors": b"other", "README.md": b""})
        hub.repos["org/public"] = Repo()
        hub.repos["org/public"].commit({"README.md": b""})
        world = World(hub, root)
        world.results = client(world, "harden", "check", "refused")
        yield world


@pytest.fixture(scope="module")
def local(world: World) -> Path:
    """The same by the local route."""
    output = world.root / "local"
    harden_checkpoint(
        world.root / "aligned", output, LoxConfig(str(world.root / "base"), r=3, exclude_modules=["lm_head"])
    )
    return output


def test_the_shards_are_byte_for_byte_those_of_the_local_route(world: World, local: Path) -> None:
    published = files(world, "hardened")
    assert zoo.count_shards(local) > 3
    for path in local.iterdir():
        if path.name not in (REPORT, "config.json", "lox_config.json"):  # those name the models, here by folder
            assert published[path.name] == path.read_bytes(), path.name
    assert published.keys() - {path.name for path in local.iterdir()} == {
        "README.md",
        "energy.png",
        ".gitattributes",
    }


def test_stamp_and_report_name_both_commits(world: World, local: Path) -> None:
    published = files(world, "hardened")
    report = HardeningReport.from_json(published[REPORT].decode())
    assert report.aligned.to_dict() == world.reference("aligned")
    assert report.base is not None and report.base.to_dict() == world.reference("base")
    assert report.output == "org/hardened"
    names = [item.name for item in HardeningReport.from_json((local / REPORT).read_text()).tensors]
    assert [item.name for item in report.tensors] == names
    stamp = json.loads(published["config.json"])["lox_config"]
    assert [stamp["aligned_revision"], stamp["revision"]] == [report.aligned.revision, report.base.revision]


def test_one_commit_with_a_card_in_a_private_repository(world: World) -> None:
    repo = world.hub.repos["org/hardened"]
    assert repo.private and len(repo.commits) == 2  # one that made the repository, and one with everything
    assert world.results["harden"]["url"].endswith(f"/org/hardened/commit/{world.hub.head('org/hardened')}")
    card = files(world, "hardened")["README.md"].decode()
    assert "base_model: org/aligned" in card and "not evaluated" in card


def test_what_was_measured_of_an_earlier_model_goes(world: World) -> None:
    repo = world.hub.repos["org/renewed"] = Repo(private=True)
    old = {"lox_report.json": b"{}", "evaluation/advbench/after.json": b"{}", ".eval_results/lox.yaml": b"[]"}
    repo.commit({**old, "notes.md": b"mine"})
    (world.root / "aligned" / "diary.csv").write_text("not for the Hub")
    assert client(world, "renew") == {"renew": "no error"}
    (world.root / "aligned" / "diary.csv").unlink()
    found = files(world, "renewed")
    assert not {"evaluation/advbench/after.json", ".eval_results/lox.yaml", "diary.csv"} & found.keys()
    assert {"notes.md", "energy.png", "config.json", "tokenizer.json"} & found.keys() >= {"notes.md", "energy.png"}


def test_nothing_stays_on_disk_and_nothing_goes_into_the_cache(world: World) -> None:
    assert world.results["harden"]["left"] == world.results["harden"]["cached"] == []
    assert world.results["check"]["left"] == []


def test_base_tensors_come_only_for_what_is_edited(world: World) -> None:
    shards = {name: data for name, data in files(world, "base").items() if name.endswith(".safetensors")}
    edited = {item.name for item in HardeningReport.from_json(files(world, "hardened")[REPORT].decode()).tensors}
    everything = {name for data in shards.values() for name in load(data)}
    assert "lm_head.weight" in everything - edited
    asked = {(path, wanted) for path, wanted in world.hub.ranges if "/org/base/resolve/" in path}
    assert len(asked) == len(shards) + len(edited)  # every header, and every tensor that is edited


def test_what_was_published_is_verified_from_the_hub(world: World) -> None:
    found = world.results["check"]
    assert found["verified"] and found["exact"]
    assert found["models"] == [world.hub.head(f"org/{name}") for name in ("hardened", "aligned", "base")]


@pytest.mark.parametrize(
    ("case", "match"),
    [
        ("input", "OutputError: The output 'org/base' is an input"),
        ("others", "OutputError: The output 'org/other' holds other weights.*model.safetensors"),
        ("adapter", "UnsupportedModelError: 'org/adapter' is an adapter, which is small.*lox-hf push"),
        ("no folder", "CheckpointError: There is no folder"),
        ("no work folder", "OutputError: There is no folder /nowhere for the work"),
        ("no revision", "CheckpointError: 'org/aligned' has no revision 'v9'"),
        ("not an id", "ConfigError: 'not an id' is not a Hub id"),
        ("no owner", "ConfigError: 'alone' is not a Hub id with its owner"),
        ("bad token", "ConfigError: The Hub token holds a space"),
        ("public", "OutputError: 'org/public' exists and is public"),
        ("no login", "CheckpointError: 'org/aligned' is neither a folder"),
    ],
)
def test_what_is_refused_before_any_work(case: str, match: str, world: World) -> None:
    message = world.results["refused"][case]
    assert re.match(match, message), message
    assert "org/new" not in world.hub.repos


def test_faults_on_the_way_change_nothing(world: World) -> None:
    """Reads that are cut, a busy Hub, and an upload that is cut in the middle."""
    hub = world.hub
    faults = [
        hub.fail("/store/", cut_after=5000, method="GET", times=3),
        hub.fail("/resolve/.*safetensors", status=503, times=1),
        hub.fail("/store/", cut_after=5000, method="PUT", times=1, skip=2),
    ]
    hub.store.clear()
    assert client(world, "harden_again") == {"harden_again": "no error"}
    assert not any(fault.times for fault in faults)
    first, again = files(world, "hardened"), files(world, "again")
    assert all(again[name] == data for name, data in first.items() if name.endswith((".safetensors", "index.json")))


def test_a_run_that_fails_publishes_nothing_and_sends_no_shard_twice(world: World) -> None:
    hub = world.hub
    del hub.repos["org/again"]
    hub.store.clear()
    fault = hub.fail("/api/models/org/again/commit/", status=403, message="Storage limit reached")
    before = len(hub.requests)
    message = client(world, "harden_again")["harden_again"]
    assert message.startswith("CheckpointError: Cannot upload to 'org/again': HTTP 403, Storage limit reached")
    assert not fault.times and set(files(world, "again")) == {".gitattributes"}
    sent = [path for method, path, _ in hub.requests[before:] if method == "PUT"]
    changed = {name for name, data in files(world, "hardened").items() if data != files(world, "aligned").get(name)}
    assert len(sent) == len([name for name in changed if name.endswith(".safetensors")])
    before = len(hub.requests)
    assert client(world, "harden_again") == {"harden_again": "no error"}
    assert not [path for method, path, _ in hub.requests[before:] if method == "PUT"]
    assert list((world.root / "work").iterdir()) == []


def test_folders_and_a_subspace_go_to_the_hub_too(world: World) -> None:
    found = client(world, "harden_folders", "command")
    assert found == {"harden_folders": "no error", "command": 0}
    hardened = {name: data for name, data in files(world, "hardened").items() if name.endswith(".safetensors")}
    by_command = files(world, "by-command")
    assert all(by_command[name] == data for name, data in hardened.items())
    assert "output" in world.printed[-2] and 'from_pretrained("org/by-command")' in world.printed[-2]
    assert files(world, "from-folders").keys() >= hardened.keys()


def test_tampering_is_found_from_the_hub_alone(world: World) -> None:
    shard, name = next(
        (shard, name)
        for shard, data in files(world, "hardened").items()
        if shard.endswith(".safetensors")
        for name, tensor in load(data).items()
        if "mlp.up_proj" in name
    )
    tensors = load(files(world, "hardened")[shard])
    tensors[name][3, 5] *= -1
    world.hub.repos["org/flipped"] = Repo()
    world.hub.repos["org/flipped"].commit({**files(world, "hardened"), shard: save(tensors, {"format": "pt"})})
    config = json.loads(files(world, "hardened")["config.json"])
    config["lox_config"]["aligned_revision"] = "0" * 40
    world.hub.repos["org/gone"] = Repo()
    world.hub.repos["org/gone"].commit({**files(world, "hardened"), "config.json": json.dumps(config).encode()})
    found = client(world, "check_altered")["check_altered"]
    assert found["flipped"] == [False, [name]] and found["command"] == 1
    assert re.match(r"CheckpointError: A model that it was made of.*no revision '0{40}'.*--aligned", found["gone"])
    assert f"Different: {name}: 1 of " in world.printed[-2]


def test_the_token_goes_to_the_hub_and_nowhere_else(world: World) -> None:
    """Runs last."""
    assert not any(logged_in for _, path, logged_in in world.hub.requests if path.startswith("/store/"))
    assert not any(TOKEN in text for text in world.printed)
    kept = [path for path in world.root.rglob("*") if path.is_file() and TOKEN.encode() in path.read_bytes()]
    assert not kept
    assert not any(TOKEN.encode() in data for repo in world.hub.repos.values() for data in repo.at("main")[1].values())
